# Early exit: what server-context has beside upstream's files. Included where TARGET is that library.

target_sources(${TARGET} PRIVATE
    ../../common/drex-exits.cpp
    server-drex.cpp
    server-drex-fields.cpp
    server-drex-files.cpp
    server-drex-metrics.cpp
    server-drex-tokens.cpp
    server-drex.h
)

find_path   (DREX_INCLUDE_DIR drex.h REQUIRED)
find_library(DREX_LIBRARY     drex   REQUIRED)
target_include_directories(${TARGET} PRIVATE ${PROJECT_SOURCE_DIR}/src ${DREX_INCLUDE_DIR})
target_link_libraries(${TARGET} PUBLIC ${DREX_LIBRARY})
