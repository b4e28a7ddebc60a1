// NVIDIA's management library without a GPU, for tests: one device, whose SM clock falls with each reading.
// Built as libnvidia-ml.so.1.
#include <cstdio>
#include <cstring>

static int device;
static unsigned clock_mhz = 1980;

extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlSystemGetDriverVersion(char* text, unsigned length) { return snprintf(text, length, "580.1") < 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char* bus, void** handle) {
  *handle = &device;
  return strcmp(bus, "0000:00:00.0") ? 6 : 0;  // NVML_ERROR_NOT_FOUND
}
int nvmlDeviceGetClockInfo(void* handle, int type, unsigned* mhz) {
  if (handle != &device) return 2;  // NVML_ERROR_INVALID_ARGUMENT
  *mhz = type == 1 ? clock_mhz : 2619;  // NVML_CLOCK_SM, NVML_CLOCK_MEM
  if (type == 1) clock_mhz -= 15;
  return 0;
}
int nvmlDeviceGetMaxClockInfo(void*, int, unsigned* mhz) { *mhz = 1980; return 0; }
int nvmlDeviceGetTemperature(void*, int sensor, unsigned* celsius) { *celsius = 40; return sensor ? 2 : 0; }
int nvmlDeviceGetPowerUsage(void*, unsigned*) { return 3; }  // NVML_ERROR_NOT_SUPPORTED
}
