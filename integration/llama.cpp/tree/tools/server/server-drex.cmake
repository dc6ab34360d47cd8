# Early exit: what server-context has beside upstream's files. Included where TARGET is that library.

# the page at /drex is a literal of the program
set(SERVER_DREX_PAGE_HTML ${CMAKE_CURRENT_SOURCE_DIR}/server-drex-page.html)
set(SERVER_DREX_PAGE_CPP  ${CMAKE_CURRENT_BINARY_DIR}/server-drex-page.cpp)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${SERVER_DREX_PAGE_HTML})
file(READ ${SERVER_DREX_PAGE_HTML} SERVER_DREX_PAGE)
configure_file(server-drex-page.cpp.in ${SERVER_DREX_PAGE_CPP} @ONLY)

target_sources(${TARGET} PRIVATE
    ../../common/drex-exits.cpp
    server-drex.cpp
    server-drex-fields.cpp
    server-drex-files.cpp
    server-drex-metrics.cpp
    server-drex-tokens.cpp
    server-drex.h
    ${SERVER_DREX_PAGE_CPP}
)

find_path   (DREX_INCLUDE_DIR drex.h REQUIRED)
find_library(DREX_LIBRARY     drex   REQUIRED)
target_include_directories(${TARGET} PRIVATE ${PROJECT_SOURCE_DIR}/src ${DREX_INCLUDE_DIR})
target_link_libraries(${TARGET} PUBLIC ${DREX_LIBRARY})
