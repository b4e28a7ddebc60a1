// A CUDA driver without a GPU, for tests: device memory is host memory, and what is issued to a stream runs only
// when somebody waits for it, in order. So what works here does not rely on luck with asynchronous work:
// - every call but the first few needs a current context;
// - copies must lie within live memory, and freed memory is overwritten;
// - an array that is changed or freed before the stream is through gives wrong results.
// Built as libcuda.so.1. TRTQ_STANDIN_CC is the compute capability (default 9.0).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <chrono>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <string>
#include <vector>

using Work = std::function<void()>;
struct Stream { std::vector<Work> queue; std::vector<Work>* graph = nullptr; bool invalid = false; };
struct Event { double ms = -1; };
struct Graph { std::vector<Work> work; };

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_CONTEXT = 201, NOT_READY = 600,
       CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, NOT_FOUND = 500, UNSUPPORTED = 801 };

static bool initialized;
static int primary_count;
static thread_local std::vector<void*> contexts;
static int primary;  // its address is the context
static std::map<uintptr_t, size_t> memory, host_memory;
static const size_t TOTAL = size_t(1) << 30;
static int failing;  // result of the next synchronization

static double now() {
  using namespace std::chrono;
  return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

static bool live(uintptr_t address, size_t size) {
  auto next = memory.upper_bound(address);
  if (next == memory.begin()) return false;
  --next;
  return address + size <= next->first + next->second;
}

static size_t used() {
  size_t sum = 0;
  for (auto& entry : memory) sum += entry.second;
  return sum;
}

static int issue(Stream* stream, Work work) {
  if (contexts.empty()) return INVALID_CONTEXT;
  (stream->graph ? *stream->graph : stream->queue).push_back(std::move(work));
  return OK;
}

#define NEEDS_CONTEXT if (contexts.empty()) return INVALID_CONTEXT

extern "C" {
int cuInit(unsigned) { initialized = true; return OK; }
int cuDriverGetVersion(int* version) { *version = 13000; return OK; }
int cuDeviceGetCount(int* count) { *count = 1; return initialized ? OK : NOT_INITIALIZED; }
int cuDeviceGet(int* device, int) { *device = 0; return initialized ? OK : NOT_INITIALIZED; }
int cuDeviceGetName(char* name, int length, int) { snprintf(name, length, "Stand-in GPU"); return OK; }
int cuDeviceGetPCIBusId(char* name, int length, int) { snprintf(name, length, "0000:00:00.0"); return OK; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const char* given = getenv("TRTQ_STANDIN_CC");
  int major = 9, minor = 0;
  if (given) sscanf(given, "%d.%d", &major, &minor);
  *value = attribute == 75 ? major : attribute == 76 ? minor : 1;
  return OK;
}
int cuDevicePrimaryCtxRetain(void** context, int) { *context = &primary; ++primary_count; return OK; }
int cuDevicePrimaryCtxRelease_v2(int) { return --primary_count < 0 ? INVALID_CONTEXT : OK; }
int cuDevicePrimaryCtxRelease(int device) { return cuDevicePrimaryCtxRelease_v2(device); }
int cuCtxSetCurrent(void* context) {
  if (!contexts.empty()) contexts.pop_back();
  if (context) contexts.push_back(context);
  return OK;
}
int cuCtxPushCurrent_v2(void* context) { contexts.push_back(context); return OK; }
int cuCtxPopCurrent_v2(void** context) {
  NEEDS_CONTEXT;
  if (context) *context = contexts.back();
  contexts.pop_back();
  return OK;
}
int cuCtxGetCurrent(void** context) { *context = contexts.empty() ? nullptr : contexts.back(); return OK; }
int cuCtxGetDevice(int* device) { NEEDS_CONTEXT; *device = 0; return OK; }
int cuCtxGetApiVersion(void*, unsigned* version) { *version = 3020; return OK; }
int cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  NEEDS_CONTEXT;
  *total = TOTAL;
  *free_bytes = TOTAL - used();
  return OK;
}
int cuMemAlloc_v2(uintptr_t* address, size_t size) {
  NEEDS_CONTEXT;
  if (!size) return INVALID_VALUE;
  if (used() + size > TOTAL) return OUT_OF_MEMORY;
  void* found = malloc(size);
  memset(found, 0xA5, size);
  *address = (uintptr_t)found;
  memory[*address] = size;
  return OK;
}
int cuMemFree_v2(uintptr_t address) {
  NEEDS_CONTEXT;
  auto found = memory.find(address);
  if (found == memory.end()) return INVALID_VALUE;
  memset((void*)address, 0xFF, found->second);  // and never handed out again: a late reader reads this
  memory.erase(found);
  return OK;
}
int cuMemHostAlloc(void** address, size_t size, unsigned) {
  NEEDS_CONTEXT;
  *address = malloc(size ? size : 1);
  host_memory[(uintptr_t)*address] = size;
  return OK;
}
int cuMemFreeHost(void* address) {
  auto found = host_memory.find((uintptr_t)address);
  if (found == host_memory.end()) return INVALID_VALUE;
  memset(address, 0xFF, found->second);
  host_memory.erase(found);
  return OK;
}
int cuMemcpyHtoDAsync_v2(uintptr_t to, const void* from, size_t size, Stream* stream) {
  if (!live(to, size)) return INVALID_VALUE;
  return issue(stream, [=] { memcpy((void*)to, from, size); });
}
int cuMemcpyDtoHAsync_v2(void* to, uintptr_t from, size_t size, Stream* stream) {
  if (!live(from, size)) return INVALID_VALUE;
  return issue(stream, [=] { memcpy(to, (void*)from, size); });
}
int cuStreamCreate(Stream** stream, unsigned) { NEEDS_CONTEXT; *stream = new Stream; return OK; }
int cuStreamDestroy_v2(Stream*) { return OK; }
int cuStreamSynchronize(Stream* stream) {
  NEEDS_CONTEXT;
  if (stream->graph) { stream->invalid = true; return CAPTURE_UNSUPPORTED; }
  std::vector<Work> queue;
  queue.swap(stream->queue);
  for (auto& work : queue) work();
  int result = failing;
  failing = 0;
  return result;
}
int cuStreamQuery(Stream* stream) { return stream->queue.empty() ? OK : NOT_READY; }
int cuEventCreate(Event** event, unsigned) { NEEDS_CONTEXT; *event = new Event; return OK; }
int cuEventDestroy_v2(Event*) { return OK; }
int cuEventRecord(Event* event, Stream* stream) {
  event->ms = -1;
  return issue(stream, [=] { event->ms = now(); });
}
int cuEventElapsedTime(float* ms, Event* start, Event* end) {
  if (start->ms < 0 || end->ms < 0) return NOT_READY;
  *ms = float(end->ms - start->ms);
  return OK;
}
int cuEventElapsedTime_v2(float* ms, Event* start, Event* end) { return cuEventElapsedTime(ms, start, end); }
int cuLaunchHostFunc(Stream* stream, void (*function)(void*), void* data) {
  return issue(stream, [=] { function(data); });
}
int cuStreamBeginCapture_v2(Stream* stream, int) {
  NEEDS_CONTEXT;
  stream->graph = new std::vector<Work>;
  stream->invalid = false;
  return OK;
}
int cuStreamEndCapture(Stream* stream, Graph** graph) {
  auto* work = stream->graph;
  stream->graph = nullptr;
  *graph = nullptr;
  if (!work || stream->invalid) return CAPTURE_INVALIDATED;
  *graph = new Graph{*work};
  return OK;
}
int cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long) {
  *executable = new Graph(*graph);
  return OK;
}
int cuGraphLaunch(Graph* executable, Stream* stream) {
  for (auto& work : executable->work) issue(stream, work);
  return OK;
}
int cuGraphDestroy(Graph* graph) { delete graph; return OK; }
int cuGraphExecDestroy(Graph* graph) { delete graph; return OK; }
int cuGetErrorName(int code, const char** name) {
  static const std::map<int, const char*> names = {
      {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"}, {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
      {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"}, {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}};
  auto found = names.find(code);
  *name = found == names.end() ? "CUDA_ERROR" : found->second;
  return OK;
}
int cuGetErrorString(int code, const char** text) { return cuGetErrorName(code, text); }

// What the stand-in TensorRT and the tests ask.
int standin_live(uintptr_t address, size_t size) { return live(address, size); }
size_t standin_used() { return used(); }
void standin_fail(int code) { failing = code; }
int standin_capturing(Stream* stream) { return stream->graph != nullptr; }

int cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, int* status) {
  void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  *function = nullptr;
  for (const char* suffix : {"_v2", ""})
    if (!*function) *function = dlsym(self, (std::string(symbol) + suffix).c_str());
  if (status) *status = *function ? 0 : 1;
  return *function ? OK : NOT_FOUND;
}
int cuGetProcAddress(const char* symbol, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}
}
