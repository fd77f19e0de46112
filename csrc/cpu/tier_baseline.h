// Any machine: 16-byte vectors, whatever the compiler makes of them.
#define LSM_CPU_TIER baseline
#define LSM_CPU_VECTOR_BYTES 16
#define LSM_CPU_REGISTERS 16
#define LSM_CPU_HARDWARE_F16 0
#define LSM_CPU_F64 1
