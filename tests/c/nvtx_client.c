/* SPDX-License-Identifier: Apache-2.0
 *
 * One range as drex makes it, by NVIDIA's own header: what it lets the library
 * of nvtx_injection.c see is what drex must. */

#include <nvtx3/nvToolsExt.h>

int main(void) {
    const nvtxDomainHandle_t domain = nvtxDomainCreateA("drex");
    const nvtxStringHandle_t name = nvtxDomainRegisterStringA(domain, "plan");
    nvtxEventAttributes_t event = {0};
    event.version = NVTX_VERSION;
    event.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
    event.messageType = NVTX_MESSAGE_TYPE_REGISTERED;
    event.message.registered = name;
    nvtxDomainRangePushEx(domain, &event);
    nvtxDomainRangePop(domain);
    return 0;
}
