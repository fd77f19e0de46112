# The emulator and the kernels on it: _emu (plain), _emu_race (race build).
#
# A .cu file is compiled through a generated .cpp that includes it, so that one CMake run can hand the same file to
# nvcc as well. Needs CUDA's headers (no nvcc, no driver) and CUTLASS's.

find_path(LSM_CUDA_INCLUDE_DIR cuda_bf16.h
  HINTS ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES include
  PATHS /usr/local/cuda /usr/local/cuda-13.0 DOC "CUDA's headers")
find_path(LSM_CUTLASS_INCLUDE_DIR cute/tensor.hpp HINTS "${LSM_CUTLASS_DIR}" DOC "CUTLASS's headers")
if(NOT LSM_CUDA_INCLUDE_DIR OR NOT LSM_CUTLASS_INCLUDE_DIR)
  message(FATAL_ERROR "the emulator needs LSM_CUDA_INCLUDE_DIR (cuda_bf16.h) and LSM_CUTLASS_DIR (cute/)")
endif()

set(LSM_EMU_DIR "${CMAKE_CURRENT_LIST_DIR}")
get_filename_component(LSM_CSRC_DIR "${LSM_EMU_DIR}" DIRECTORY)
file(GLOB LSM_EMU_RUNTIME CONFIGURE_DEPENDS ${LSM_EMU_DIR}/*.cpp)
list(REMOVE_ITEM LSM_EMU_RUNTIME ${LSM_EMU_DIR}/module.cpp)

# Flags of one flavour (plain, race), on every file that includes emulator headers.
function(lsm_emulator_flags target flavour)
  # The shadowed cute/arch headers come before CUTLASS's own.
  target_include_directories(${target} PRIVATE ${LSM_EMU_DIR}/shadow ${LSM_CSRC_DIR})
  target_include_directories(${target} SYSTEM PRIVATE
    ${LSM_CUTLASS_INCLUDE_DIR} ${LSM_CUDA_INCLUDE_DIR} ${LSM_CUDA_INCLUDE_DIR}/cccl)
  # -fno-strict-aliasing: CuTe reads bf16 fragments as words. -g1: reports name source lines. -fno-gnu-unique: two
  # flavours in one process must not share inline variables.
  target_compile_options(${target} PRIVATE -g1 -fno-strict-aliasing -fno-gnu-unique -Wall -Wextra)
  if(flavour STREQUAL "race")
    target_compile_definitions(${target} PRIVATE LSM_EMU_RACE=1)
  endif()
endfunction()

# The runtime of one flavour, compiled once.
function(lsm_emulator_runtime flavour)
  if(NOT TARGET emulator_${flavour})
    add_library(emulator_${flavour} OBJECT ${LSM_EMU_RUNTIME})
    lsm_emulator_flags(emulator_${flavour} ${flavour})
    target_compile_options(emulator_${flavour} PRIVATE -O2 -mpopcnt)  # the schedulers count bits all the time
  endif()
endfunction()

# Adds kernels (.cu) to a target, as C++ for one flavour, and the runtime under them.
function(lsm_emulated_kernels target flavour)
  lsm_emulator_runtime(${flavour})
  set(wrappers)
  foreach(source IN LISTS ARGN)
    get_filename_component(source "${source}" ABSOLUTE)
    file(RELATIVE_PATH name "${CMAKE_SOURCE_DIR}" "${source}")
    set(wrapper "${CMAKE_CURRENT_BINARY_DIR}/emulated/${name}.cpp")
    file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"${source}\"\n")
    list(APPEND wrappers "${wrapper}")
  endforeach()
  add_library(${target}_kernels OBJECT ${wrappers})
  lsm_emulator_flags(${target}_kernels ${flavour})
  # -O1 compiles fastest and runs as fast; -O0 is a hundred times slower. The race hooks are the runtime's own, so
  # nothing is linked with -fsanitize=thread.
  # platform.h goes first whatever a file includes first: CuTe must see its macros.
  target_compile_options(${target}_kernels PRIVATE -O1 "SHELL:-include emu/platform.h"
    -Wno-unknown-pragmas -Wno-missing-field-initializers)
  if(flavour STREQUAL "race")
    target_compile_options(${target}_kernels PRIVATE -fsanitize=thread
      "SHELL:--param tsan-instrument-func-entry-exit=0" "SHELL:--param tsan-distinguish-volatile=1"
      -fsanitize=alignment -fsanitize-undefined-trap-on-error)
  endif()
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${target}_kernels> $<TARGET_OBJECTS:emulator_${flavour}>)
  target_link_libraries(${target} PRIVATE ${CMAKE_DL_LIBS})
endfunction()

# One Python module: the operators on CPU tensors as torch.ops.<namespace>, and the controls of module.cpp.
function(lsm_emulator_module name flavour namespace)
  add_library(${name} MODULE ${LSM_EMU_DIR}/module.cpp csrc/library.cpp ${op_sources})
  lsm_emulated_operators(${name} ${flavour} ${namespace} ${kernel_sources} ${sm90_sources})
endfunction()

function(lsm_emulated_operators name flavour namespace)
  lsm_emulated_kernels(${name} ${flavour} ${ARGN})
  target_link_libraries(${name} PRIVATE torch_stable pybind11::headers Python::Module)
  target_compile_definitions(${name} PRIVATE
    LSM_BACKEND_EMULATOR LSM_NAMESPACE=${namespace} LSM_EMU_MODULE=${name})
  target_compile_options(${name} PRIVATE -O1 -fno-gnu-unique)
  target_include_directories(${name} SYSTEM PRIVATE ${LSM_CUDA_INCLUDE_DIR})
  set_target_properties(${name} PROPERTIES PREFIX "" SUFFIX ".so"
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}")
  target_link_options(${name} PRIVATE LINKER:-Bsymbolic)
endfunction()

# The example of a policy from outside the tree (docs/adding_a_policy.md), on CPU kernels and on the emulator: the chunk
# engine once more, but for its sweeps and its polynomials, which know of no policy.
function(lsm_example_policy header)
  set(policies "LSM_MORE_POLICIES=\"${CMAKE_SOURCE_DIR}/${header}\"")
  add_library(_C_example SHARED EXCLUDE_FROM_ALL
    csrc/library.cpp csrc/ops/chunk.cpp csrc/cpu/chunk.cpp ${cpu_chunk_baseline})
  lsm_python_free_library(_C_example)
  target_compile_definitions(_C_example PRIVATE LSM_BACKEND_CPU LSM_CPU_X86_TIERS=0
    LSM_NAMESPACE=lsm_example ${policies})

  add_library(_emu_example MODULE EXCLUDE_FROM_ALL ${LSM_EMU_DIR}/module.cpp csrc/library.cpp csrc/ops/chunk.cpp)
  set(sources ${kernel_sources})
  list(FILTER sources INCLUDE REGEX "kernels/(chunk|recurrence|step)/")
  list(FILTER sources EXCLUDE REGEX "kernels/chunk/sweep_")
  lsm_emulated_operators(_emu_example plain lsm_emu_example ${sources})
  target_sources(_emu_example PRIVATE $<FILTER:$<TARGET_OBJECTS:_emu_kernels>,INCLUDE,kernels/chunk/sweep_|kernels/polynomial/>)
  foreach(target _emu_example _emu_example_kernels)
    target_compile_definitions(${target} PRIVATE ${policies})
  endforeach()
endfunction()

find_package(Python COMPONENTS Interpreter Development.Module REQUIRED)
if(NOT pybind11_DIR)
  execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
    OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
set(PYBIND11_FINDPYTHON ON)
find_package(pybind11 CONFIG REQUIRED)

lsm_emulator_module(_emu plain lsm_emu)
lsm_emulator_module(_emu_race race lsm_emu_race)
lsm_example_policy(examples/custom_policy/square_gate.h)

add_subdirectory(${CMAKE_SOURCE_DIR}/tests/kernels ${CMAKE_BINARY_DIR}/kernel_tests)
