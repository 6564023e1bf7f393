// machine.h: how many threads to use when the user does not say.
#pragma once

#include <cstdint>

// Cores this process may run on: hyper-threads of one core count once, except on machines of up to four, where they
// are usually a virtual machine's whole share.
int32_t pinfer_machine_threads(void);
