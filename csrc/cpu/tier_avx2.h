// AVX2, FMA and F16C. The target holds to the end of the file that includes this: templates are compiled there.
#pragma GCC target("avx2,fma,f16c")
#define LSM_CPU_TIER avx2
#define LSM_CPU_VECTOR_BYTES 32
#define LSM_CPU_REGISTERS 16
#define LSM_CPU_HARDWARE_F16 1
#define LSM_CPU_F64 1
