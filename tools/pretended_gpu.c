// A CUDA runtime and driver that show one H100 and do nothing, for tools/gpu_counts.py: tensors are fake there.
// -DRUNTIME: the functions of libcudart that torch calls; else libcuda.so.1, of which Triton asks a few numbers.

#define NOTHING(name) int name() { return 0; }
#define NUMBER(name, type, value) int name(type *out) { *out = (value); return 0; }
#define NUMBER_OF(name, type, value) int name(type *out, void *of) { *out = (value); return 0; }

#ifdef RUNTIME
#include "driver_types.h"
#include <string.h>

int cudaGetDeviceProperties(struct cudaDeviceProp *out, int device) {
    struct cudaDeviceProp h100 = {
        .name = "H100, pretended", .major = 9, .minor = 0, .multiProcessorCount = 132, .warpSize = 32,
        .maxThreadsPerBlock = 1024, .maxThreadsPerMultiProcessor = 2048, .regsPerMultiprocessor = 65536,
        .regsPerBlock = 65536, .totalGlobalMem = 80000000000, .sharedMemPerBlock = 49152,
        .sharedMemPerBlockOptin = 232448, .sharedMemPerMultiprocessor = 233472, .l2CacheSize = 52428800};
    memcpy(out, &h100, sizeof h100);
    return 0;
}

NUMBER(cudaGetDeviceCount, int, 1)
NUMBER(cudaGetDevice, int, 0)
NUMBER(cudaDriverGetVersion, int, 13020)
NUMBER(cudaRuntimeGetVersion, int, 13020)
NUMBER_OF(cudaStreamCreateWithPriority, void *, (void *)1)
NUMBER_OF(cudaEventCreateWithFlags, void *, (void *)1)
NUMBER(cudaThreadExchangeStreamCaptureMode, int, 0)
int cudaStreamIsCapturing(void *stream, int *out) { *out = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaMemGetInfo(unsigned long *free, unsigned long *total) { *free = *total = 80000000000; return 0; }
NOTHING(cudaSetDevice)
NOTHING(cudaGetLastError)
NOTHING(cudaPeekAtLastError)
NOTHING(cudaDeviceSynchronize)
NOTHING(cudaStreamQuery)
NOTHING(cudaStreamSynchronize)
NOTHING(cudaStreamWaitEvent)
NOTHING(cudaEventDestroy)
NOTHING(cudaEventRecord)
NOTHING(cudaEventRecordWithFlags)
NOTHING(cudaEventQuery)
NOTHING(cudaEventSynchronize)
NOTHING(cudaFree)

#else

int cuDeviceGetAttribute(int *out, int attribute, int device) {  // numbers as of the driver's CUdevice_attribute
    *out = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : attribute == 10 ? 32
         : attribute == 97 ? 232448 : attribute == 12 || attribute == 82 ? 65536 : attribute == 39 ? 2048 : 1;
    return 0;
}

NUMBER(cuCtxGetCurrent, void *, (void *)1)
NUMBER_OF(cuDeviceGet, int, 0)
NUMBER(cuDeviceGetCount, int, 1)
NUMBER(cuDriverGetVersion, int, 13020)
NOTHING(cuInit)
NOTHING(cuCtxGetDevice)
NOTHING(cuCtxSetCurrent)
NOTHING(cuDevicePrimaryCtxRetain)
NOTHING(cuDevicePrimaryCtxGetState)
NOTHING(cuGetErrorString)
NOTHING(cuModuleLoadData)
NOTHING(cuModuleGetFunction)
NOTHING(cuModuleUnload)
NOTHING(cuFuncGetAttribute)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuLaunchKernelEx)
NOTHING(cuPointerGetAttribute)
NOTHING(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetLimit)
#endif
