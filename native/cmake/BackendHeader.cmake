# ggml-backend-impl.h, the interface a ggml backend implements, and ggml-impl.h, the graph as a backend gets it. ggml does
# not install them, so they are taken out of the source distribution named in llama-cpp-python.txt, and that distribution
# must carry the ggml that was found.
#
#   PINFER_GGML_BACKEND_IMPL   path of the first, beside the second, when they are at hand (a llama.cpp source tree)
#   PINFER_LLAMA_SDIST         path of the source distribution, when it is at hand; else pip fetches it

set(PINFER_GGML_BACKEND_IMPL "" CACHE FILEPATH "ggml-backend-impl.h of the ggml that is linked")
set(PINFER_LLAMA_SDIST "" CACHE FILEPATH "source distribution of llama-cpp-python")

set(_pinfer_pin_file "${CMAKE_CURRENT_LIST_DIR}/llama-cpp-python.txt")

# Sets <out> to the path of the source distribution, fetched into the build folder if need be.
function(pinfer_llama_sdist out)
    file(STRINGS "${_pinfer_pin_file}" pin REGEX "^llama-cpp-python==")
    string(REGEX MATCH "==([^ ]+) --hash=sha256:([0-9a-f]+)" _ "${pin}")
    set(version "${CMAKE_MATCH_1}")
    set(sha256 "${CMAKE_MATCH_2}")

    set(sdist "${PINFER_LLAMA_SDIST}")
    if(NOT sdist)
        set(sdist "${CMAKE_BINARY_DIR}/sdist/llama_cpp_python-${version}.tar.gz")
        if(NOT EXISTS "${sdist}")
            message(STATUS "Fetching the source distribution of llama-cpp-python ${version}")
            find_package(Python3 REQUIRED COMPONENTS Interpreter)
            execute_process(
                COMMAND "${Python3_EXECUTABLE}" -m pip download --quiet --no-deps --no-binary llama-cpp-python
                        --require-hashes --requirement "${_pinfer_pin_file}" --dest "${CMAKE_BINARY_DIR}/sdist"
                RESULT_VARIABLE status)
            if(NOT status EQUAL 0)
                message(FATAL_ERROR "pip could not fetch llama-cpp-python ${version}; give the file with "
                                    "-DPINFER_LLAMA_SDIST=... or the header with -DPINFER_GGML_BACKEND_IMPL=...")
            endif()
        endif()
    endif()

    file(SHA256 "${sdist}" found)
    if(NOT found STREQUAL sha256)
        message(FATAL_ERROR "${sdist} is not the source distribution of llama-cpp-python ${version}: its SHA-256 is "
                            "${found}, not ${sha256}")
    endif()
    set(${out} "${sdist}" PARENT_SCOPE)
endfunction()

# Creates the target pinfer::backend-header for a ggml of version <ggml_version>.
function(pinfer_add_backend_header ggml_version)
    set(folder "${CMAKE_BINARY_DIR}/backend-header")
    set(header "${folder}/ggml-impl.h")
    if(PINFER_GGML_BACKEND_IMPL)
        file(MAKE_DIRECTORY "${folder}")
        get_filename_component(source "${PINFER_GGML_BACKEND_IMPL}" DIRECTORY)
        configure_file("${PINFER_GGML_BACKEND_IMPL}" "${folder}/ggml-backend-impl.h" COPYONLY)
        configure_file("${source}/ggml-impl.h" "${header}" COPYONLY)
    else()
        set(stamp "${folder}/ggml-${ggml_version}")
        if(NOT EXISTS "${header}" OR NOT EXISTS "${stamp}")
            pinfer_llama_sdist(sdist)
            file(REMOVE_RECURSE "${folder}" "${CMAKE_BINARY_DIR}/sdist/unpacked")
            file(ARCHIVE_EXTRACT INPUT "${sdist}" DESTINATION "${CMAKE_BINARY_DIR}/sdist/unpacked"
                 PATTERNS "*/vendor/llama.cpp/ggml/CMakeLists.txt"
                          "*/vendor/llama.cpp/ggml/src/ggml-backend-impl.h"
                          "*/vendor/llama.cpp/ggml/src/ggml-impl.h")
            file(GLOB ggml "${CMAKE_BINARY_DIR}/sdist/unpacked/*/vendor/llama.cpp/ggml")
            set(parts "")
            foreach(part MAJOR MINOR PATCH)
                file(STRINGS "${ggml}/CMakeLists.txt" line REGEX "^set\\(GGML_VERSION_${part} [0-9]+\\)")
                string(REGEX MATCH "[0-9]+" number "${line}")
                list(APPEND parts "${number}")
            endforeach()
            list(JOIN parts "." sdist_version)
            if(NOT sdist_version STREQUAL ggml_version)
                message(FATAL_ERROR "The ggml found is ${ggml_version}, the one pinfer is written for is "
                                    "${sdist_version}; install llama-cpp-python as pinned in ${_pinfer_pin_file}")
            endif()
            file(COPY "${ggml}/src/ggml-backend-impl.h" "${ggml}/src/ggml-impl.h" DESTINATION "${folder}")
            file(TOUCH "${stamp}")
        endif()
    endif()
    add_library(pinfer-backend-header INTERFACE)
    add_library(pinfer::backend-header ALIAS pinfer-backend-header)
    target_include_directories(pinfer-backend-header SYSTEM INTERFACE "${folder}")
endfunction()
