# llama.cpp's own programs, compiled from its source against the libllama-common, libmtmd and libllama that pip has built.

option(PINFER_WEB_UI "build the web page of llama.cpp's server with npm (make web-ui)" OFF)

# Creates the target pinfer::llama-common: libllama-common and libmtmd with the headers that llama.cpp does not install.
function(pinfer_add_llama_common source)
    add_library(pinfer-llama-common INTERFACE)
    add_library(pinfer::llama-common ALIAS pinfer-llama-common)
    foreach(name llama-common mtmd)
        find_library(PINFER_LIB_${name} ${name} REQUIRED HINTS "${LLAMA_LIB_DIR}" NO_DEFAULT_PATH)
        target_link_libraries(pinfer-llama-common INTERFACE "${PINFER_LIB_${name}}")
    endforeach()
    target_link_libraries(pinfer-llama-common INTERFACE llama ggml::ggml Threads::Threads)
    target_include_directories(pinfer-llama-common SYSTEM INTERFACE
        "${source}/common" "${source}/vendor" "${source}/tools/mtmd" "${source}")
    # What llama.cpp compiles its own programs with. These definitions decide the layout of types shared with the library.
    target_compile_definitions(pinfer-llama-common INTERFACE
        LLAMA_SHARED GGML_SHARED GGML_BACKEND_SHARED GGML_USE_CPU LLAMA_SUBPROCESS)
    file(STRINGS "${PINFER_LIB_llama-common}" ssl REGEX "libssl\\.so" LIMIT_COUNT 1)
    if(ssl)
        find_package(OpenSSL REQUIRED)
        target_compile_definitions(pinfer-llama-common INTERFACE CPPHTTPLIB_OPENSSL_SUPPORT)
        target_link_libraries(pinfer-llama-common INTERFACE OpenSSL::SSL OpenSSL::Crypto)
    endif()
endfunction()

# How a target of llama.cpp's sources is compiled: its C++17, its warnings off, moderate optimisation to save build time.
function(pinfer_compile_as_llama target)
    set_target_properties(${target} PROPERTIES CXX_STANDARD 17 CXX_EXTENSIONS ON)
    target_compile_options(${target} PRIVATE -w -g0 $<$<CONFIG:Release>:-O2>)
endfunction()

set(PINFER_SERVER_LIBRARY "" CACHE FILEPATH "libpinfer-llama-server.a of another build of the same source, instead of building it")

# Creates the target pinfer-llama-server: what llama.cpp's server and its chat consist of but their entries.
function(pinfer_add_llama_server source)
    if(PINFER_SERVER_LIBRARY)
        add_library(pinfer-llama-server STATIC IMPORTED)
        set_target_properties(pinfer-llama-server PROPERTIES IMPORTED_LOCATION "${PINFER_SERVER_LIBRARY}")
        get_filename_component(built "${PINFER_SERVER_LIBRARY}" DIRECTORY)
        target_include_directories(pinfer-llama-server INTERFACE "${built}/web-ui" "${source}/tools/server" "${source}/tools/cli")
        target_link_libraries(pinfer-llama-server INTERFACE pinfer::llama-common)
        return()
    endif()
    # An empty page where PINFER_WEB_UI is off: then the server answers its API alone.
    set(ui "${CMAKE_BINARY_DIR}/web-ui")
    file(CONFIGURE OUTPUT "${ui}.txt" CONTENT "${PINFER_WEB_UI}\n")
    add_custom_command(
        OUTPUT "${ui}/ui.cpp" "${ui}/ui.h"
        COMMAND "${CMAKE_COMMAND}" -E rm -rf "${ui}/dist" "${ui}/ui.cpp" "${ui}/ui.h"
        COMMAND "${CMAKE_COMMAND}" "-DUI_SOURCE_DIR=${source}/tools/ui" "-DUI_BINARY_DIR=${ui}" "-DLLAMA_SOURCE_DIR=${source}"
                "-DLLAMA_BUILD_NUMBER=${LLAMA_BUILD_NUMBER}" -DHF_ENABLED=OFF -DBUILD_UI=${PINFER_WEB_UI} -DLLAMA_UI_GZIP=ON
                -P "${source}/scripts/ui-assets.cmake"
        DEPENDS "${ui}.txt"
        COMMENT "Generating the server's web page (npm: ${PINFER_WEB_UI})"
        VERBATIM)
    file(GLOB sources "${source}/tools/server/server-*.cpp" "${source}/tools/cli/cli-client.cpp")
    add_library(pinfer-llama-server STATIC ${sources} "${ui}/ui.cpp" "${ui}/ui.h")
    pinfer_compile_as_llama(pinfer-llama-server)
    target_include_directories(pinfer-llama-server PRIVATE "${ui}" PUBLIC "${source}/tools/server" "${source}/tools/cli")
    target_link_libraries(pinfer-llama-server PUBLIC pinfer::llama-common)
endfunction()

# Creates the target pinfer-frontends: llama_completion, llama_cli and llama_server, each with the arguments of a main, in
# which the runner takes part by the macros of <hooks>.
function(pinfer_add_frontends source hooks)
    set(completion "${source}/tools/completion/completion.cpp")
    set(chat "${source}/tools/cli/cli-context.cpp")
    set(server "${source}/tools/server/server.cpp")
    set(sources "${completion}" "${chat}" "${source}/tools/cli/cli.cpp" "${server}")
    add_library(pinfer-frontends STATIC ${sources})
    pinfer_compile_as_llama(pinfer-frontends)
    target_compile_options(pinfer-frontends PRIVATE -include "${hooks}")
    target_compile_definitions(pinfer-frontends PRIVATE PINFER_HOOKS)
    set_source_files_properties(${sources} PROPERTIES OBJECT_DEPENDS "${hooks}")
    set_property(SOURCE "${completion}" APPEND PROPERTY COMPILE_DEFINITIONS PINFER_HOOKS_COMPLETION)
    set_property(SOURCE "${chat}" APPEND PROPERTY COMPILE_DEFINITIONS PINFER_HOOKS_CHAT)
    set_property(SOURCE "${server}" APPEND PROPERTY COMPILE_DEFINITIONS PINFER_HOOKS_SERVER)
    target_link_libraries(pinfer-frontends PUBLIC pinfer-llama-server)
endfunction()

# Creates the target stock: llama.cpp's programs as they are, to test the plugin in programs that know nothing of it.
function(pinfer_add_stock_programs source)
    add_custom_target(stock)
    foreach(name completion cli server bench perplexity)
        string(REPLACE "bench" "llama-bench" folder ${name})
        add_executable(llama-${name} EXCLUDE_FROM_ALL "${source}/tools/${folder}/main.cpp")
        file(GLOB sources "${source}/tools/${folder}/${name}.cpp" "${source}/tools/${folder}/llama-${name}.cpp")
        target_sources(llama-${name} PRIVATE ${sources})
        pinfer_compile_as_llama(llama-${name})
        target_link_libraries(llama-${name} PRIVATE pinfer-flags pinfer-llama-server)
        add_dependencies(stock llama-${name})
    endforeach()
    # the chat contains the server
    target_sources(llama-cli PRIVATE "${source}/tools/server/server.cpp" "${source}/tools/cli/cli-context.cpp")
endfunction()
