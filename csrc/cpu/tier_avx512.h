// AVX-512. The target holds to the end of the file that includes this: templates are compiled there.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define LSM_CPU_TIER avx512
#define LSM_CPU_VECTOR_BYTES 64
#define LSM_CPU_REGISTERS 32
#define LSM_CPU_HARDWARE_F16 1
#define LSM_CPU_F64 0
