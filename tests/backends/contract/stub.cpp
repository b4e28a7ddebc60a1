// A stand-in for the shared libraries of TensorRT, so that NVIDIA's own Python bindings can be imported without
// them, and a `drive` that calls a calibrator through its virtual table as a builder does.
//
// The classes declare nothing but the order of the virtual functions that is part of TensorRT's ABI: up to 8
// a calibrator is a plain interface; from 10 on it begins with the functions of IVersionedInterface.
// Compile with -DTENSORRT_MAJOR=8 or 10 or 11.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

// A builder and, by any of its calls, a configuration. NVIDIA's classes are a virtual table and a pointer to an
// implementation that has one too: here all is one object, and every function keeps its last argument.
struct Anything {
    void** functions;
    Anything* implementation;
    void* argument;
};

static void* call(Anything* self, void* argument) {
    self->argument = argument;
    return self;
}

static Anything* anything() {
    static void* functions[256];
    static Anything object{functions, &object, nullptr};
    for (auto& function : functions) function = reinterpret_cast<void*>(call);
    return &object;
}

extern "C" {
void* createInferBuilder_INTERNAL() { return anything(); }
void* last_argument() { return anything()->argument; }
void* createInferRefitter_INTERNAL() { return nullptr; }
void* createInferRuntime_INTERNAL() { return nullptr; }
void* getBuilderPluginRegistry() { return nullptr; }
void* getPluginRegistry() { return nullptr; }
void* createNvOnnxParser_INTERNAL() { return nullptr; }
void* createNvOnnxParserRefitter_INTERNAL() { return nullptr; }
int getNvOnnxParserVersion() { return 0; }
bool initLibNvInferPlugins() { return true; }
}

#if TENSORRT_MAJOR < 10
namespace nvuffparser {
enum class FieldType : int {};
struct FieldMap {
    FieldMap(char const*, void const*, FieldType, int);
};
FieldMap::FieldMap(char const*, void const*, FieldType, int) {}
void* createUffParser() { return nullptr; }
}  // namespace nvuffparser
namespace nvcaffeparser1 {
void* createCaffeParser() { return nullptr; }
void shutdownProtobufLibrary() {}
}  // namespace nvcaffeparser1
#endif

struct InterfaceInfo {
    char const* kind;
    int32_t major;
    int32_t minor;
};

struct Versioned {
#if TENSORRT_MAJOR >= 10
    virtual int32_t getAPILanguage() const noexcept = 0;
    virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
    virtual ~Versioned() noexcept = default;
#endif
};

struct Calibrator : Versioned {
    virtual int32_t getBatchSize() const noexcept = 0;
    virtual bool getBatch(void* bindings[], char const* names[], int32_t count) noexcept = 0;
    virtual void const* readCalibrationCache(std::size_t& length) noexcept = 0;
    virtual void writeCalibrationCache(void const* data, std::size_t length) noexcept = 0;
    virtual int32_t getAlgorithm() noexcept = 0;
#if TENSORRT_MAJOR < 10
    virtual ~Calibrator() noexcept = default;
#endif
};

struct LegacyCalibrator : Calibrator {
    virtual double getQuantile() const noexcept = 0;
    virtual double getRegressionCutoff() const noexcept = 0;
    virtual void const* readHistogramCache(std::size_t& length) noexcept = 0;
    virtual void writeHistogramCache(void const* data, std::size_t length) noexcept = 0;
};

struct ProgressMonitor : Versioned {
    virtual void phaseStart(char const* phase, char const* parent, int32_t steps) noexcept = 0;
    virtual bool stepComplete(char const* phase, int32_t step) noexcept = 0;
    virtual void phaseFinish(char const* phase) noexcept = 0;
};

// What a builder came to know by `drive`; the strings are valid until the next call.
struct Calibration {
    int32_t algorithm;
    int32_t batch_size;
    int32_t batches;
    char const* consumed;  // the bytes of all inputs of all batches
    std::size_t consumed_length;
    char const* table;  // what the calibrator gave, else what was written to it
    std::size_t table_length;
};

extern "C" {
#if TENSORRT_MAJOR >= 10
char const* interface_kind(Versioned* object) { return object->getInterfaceInfo().kind; }
#endif

// Calibrate `count` inputs, of `sizes` bytes a batch each; `computed` stands for TensorRT's own result.
Calibration drive(Calibrator* calibrator, int32_t count, char const* names[], std::size_t const sizes[],
                  char const* computed) {
    static std::string consumed, table;
    consumed.clear();
    Calibration result{calibrator->getAlgorithm(), 0, 0, nullptr, 0, nullptr, 0};
    std::size_t length = 0;
    if (void const* cache = calibrator->readCalibrationCache(length)) {
        table.assign(static_cast<char const*>(cache), length);
    } else {
        void* bindings[16] = {};
        result.batch_size = calibrator->getBatchSize();
        while (calibrator->getBatch(bindings, names, count)) {
            ++result.batches;
            for (int32_t i = 0; i < count; ++i) consumed.append(static_cast<char const*>(bindings[i]), sizes[i]);
        }
        table = computed;
        std::string temporary = table;  // a calibrator must have copied it by the end of the call
        calibrator->writeCalibrationCache(temporary.data(), temporary.size());
        temporary.assign(temporary.size(), '?');
    }
    result.consumed = consumed.data();
    result.consumed_length = consumed.size();
    result.table = table.data();
    result.table_length = table.size();
    return result;
}

// Whether a calibrator asks for one batch more.
bool next_batch(Calibrator* calibrator, char const* name) {
    void* binding = nullptr;
    return calibrator->getBatch(&binding, &name, 1);
}

double quantile(LegacyCalibrator* calibrator) { return calibrator->getQuantile(); }
double regression_cutoff(LegacyCalibrator* calibrator) { return calibrator->getRegressionCutoff(); }

// Whether a histogram comes back from the calibrator that one was written to.
bool keeps_histogram(LegacyCalibrator* calibrator) {
    calibrator->writeHistogramCache("histogram", 9);
    std::size_t length = 0;
    return calibrator->readHistogramCache(length) != nullptr;
}

bool step(ProgressMonitor* monitor) {
    monitor->phaseStart("Building", nullptr, 2);
    bool const go_on = monitor->stepComplete("Building", 0);
    monitor->phaseFinish("Building");
    return go_on;
}
}
