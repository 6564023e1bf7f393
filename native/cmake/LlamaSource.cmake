# The parts of llama.cpp's source that are needed and not installed: the interface of a ggml backend, and llama.cpp's own
# programs, which the runner calls. They are taken out of the source distribution named in llama-cpp-python.txt, and that
# distribution must carry the ggml that was found.
#
#   PINFER_LLAMA_SOURCE   a llama.cpp source tree to use instead
#   PINFER_LLAMA_SDIST    path of the source distribution, when it is at hand; otherwise pip fetches it

set(PINFER_LLAMA_SOURCE "" CACHE PATH "llama.cpp source tree of the libraries that are linked")
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
                message(FATAL_ERROR "pip could not fetch llama-cpp-python ${version}; name the file with "
                                    "-DPINFER_LLAMA_SDIST=... or a source tree with -DPINFER_LLAMA_SOURCE=...")
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

# Sets <out> to a llama.cpp source tree whose ggml is <ggml_version>; of a source distribution only what is used is unpacked.
function(pinfer_llama_source ggml_version out)
    set(source "${PINFER_LLAMA_SOURCE}")
    if(NOT source)
        set(unpacked "${CMAKE_BINARY_DIR}/llama-source")
        file(SHA256 "${CMAKE_CURRENT_FUNCTION_LIST_FILE}" this)
        string(SUBSTRING "${this}" 0 16 this)
        set(stamp "${unpacked}/ggml-${ggml_version}-${this}")
        if(NOT EXISTS "${stamp}")
            pinfer_llama_sdist(sdist)
            file(REMOVE_RECURSE "${unpacked}")
            set(parts ggml/CMakeLists.txt ggml/src/ggml-backend-impl.h ggml/src/ggml-impl.h common/*.h common/*.hpp scripts/ui-assets.cmake src/llama-ext.h
                      tools/completion/* tools/cli/* tools/server/*.cpp tools/server/*.h tools/llama-bench/*
                      tools/perplexity/* tools/mtmd/*.h tools/ui/* vendor/cpp-httplib/*.h vendor/nlohmann/*
                      vendor/sheredom/*)
            list(TRANSFORM parts PREPEND "*/vendor/llama.cpp/")
            file(ARCHIVE_EXTRACT INPUT "${sdist}" DESTINATION "${unpacked}" PATTERNS ${parts})
            file(TOUCH "${stamp}")
        endif()
        file(GLOB source "${unpacked}/*/vendor/llama.cpp")
    endif()
    set(parts "")
    foreach(part MAJOR MINOR PATCH)
        file(STRINGS "${source}/ggml/CMakeLists.txt" line REGEX "^set\\(GGML_VERSION_${part} [0-9]+\\)")
        string(REGEX MATCH "[0-9]+" number "${line}")
        list(APPEND parts "${number}")
    endforeach()
    list(JOIN parts "." found)
    if(NOT found STREQUAL ggml_version)
        message(FATAL_ERROR "The ggml found is ${ggml_version}, that of ${source} is ${found}; install llama-cpp-python as "
                            "pinned in ${_pinfer_pin_file}")
    endif()
    set(${out} "${source}" PARENT_SCOPE)
endfunction()

# Creates the target pinfer::backend-header: a folder with ggml-backend-impl.h and ggml-impl.h (the graph as a backend gets it),
# and nothing else of ggml's own sources.
function(pinfer_add_backend_header source)
    set(folder "${CMAKE_BINARY_DIR}/backend-header")
    file(MAKE_DIRECTORY "${folder}")
    foreach(header ggml-backend-impl.h ggml-impl.h)
        configure_file("${source}/ggml/src/${header}" "${folder}/${header}" COPYONLY)
    endforeach()
    add_library(pinfer-backend-header INTERFACE)
    add_library(pinfer::backend-header ALIAS pinfer-backend-header)
    target_include_directories(pinfer-backend-header SYSTEM INTERFACE "${folder}")
endfunction()
