# The CUDA side: headers for host code, nvcc for *.cu, and libtorch's CUDA libraries, which the linker must not drop
# though nothing refers to them by symbol (--no-as-needed): without them the GPU is silently absent.
# STROMA_CUDA_INCLUDE: CUDA's headers. STROMA_CUDART: the libcudart.so that this libtorch uses.
target_include_directories(stroma_torch SYSTEM INTERFACE ${STROMA_CUDA_INCLUDE})
target_compile_definitions(stroma_torch INTERFACE STROMA_CUDA)
target_link_options(stroma_torch INTERFACE -Wl,--no-as-needed)
target_link_libraries(stroma_torch INTERFACE torch_cuda c10_cuda ${STROMA_CUDART})

if(KERNEL_CUDA_SOURCES)
  # STROMA_CUDA_ARCHS: compute capabilities without their dot (86;90), one pass of nvcc each. Without it all from Ampere
  # to Blackwell. What this nvcc does not know is left out; a card that is not among them takes the PTX: of the oldest
  # where they were chosen, else of the newest, for cards that come after it.
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE nvcc_archs)
  set(archs "")
  foreach(arch ${STROMA_CUDA_ARCHS})
    if(nvcc_archs MATCHES "compute_${arch}[^0-9]")
      list(APPEND archs ${arch})
    endif()
  endforeach()
  set(ptx 80)
  if(NOT archs)
    foreach(arch 80 86 89 90 100 120)
      if(nvcc_archs MATCHES "compute_${arch}[^0-9]")
        list(APPEND archs ${arch})
      endif()
    endforeach()
    list(GET archs -1 ptx)
  endif()
  list(TRANSFORM archs APPEND "-real")
  set(CMAKE_CUDA_ARCHITECTURES ${archs} ${ptx}-virtual)
  # One runtime in the process, libtorch's: it is linked above, by path.
  set(CMAKE_CUDA_RUNTIME_LIBRARY None)
  enable_language(CUDA)
  if(CCACHE)
    set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
  endif()
  # CMake before 3.26 does not know that nvcc 12 and later take C++20.
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  # No multiply-add is fused but where it is written, as in the C++ twins (kernels/hd.h).
  set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} --fmad=false --expt-relaxed-constexpr --expt-extended-lambda -Xcompiler=-Wall")
endif()

# NCCL: libtorch_cuda carries c10d's ProcessGroupNCCL and finds libnccl by a path of its own, so that headers are all it
# takes: those of the NCCL that this libtorch was built with, in the wheel beside it. STROMA_NCCL_INCLUDE: their folders;
# without them ranks on cards exchange over Gloo.
if(STROMA_NCCL_INCLUDE)
  set(nccl_options ${STROMA_NCCL_INCLUDE})
  list(TRANSFORM nccl_options PREPEND "-isystem")
  set_source_files_properties(
    native/engine/nccl_group.cc native/engine/nccl_line.cc native/engine/nccl_links.cc PROPERTIES
    COMPILE_DEFINITIONS STROMA_NCCL COMPILE_OPTIONS "${nccl_options}")
else()
  message(STATUS "no nccl.h: ranks on cards will exchange over Gloo")
endif()
