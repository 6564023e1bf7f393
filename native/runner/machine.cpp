// machine.cpp: cores from the scheduler's affinity mask and the topology in sysfs.
#include "machine.h"

#include <cstdio>
#include <sched.h>
#include <set>
#include <string>
#include <thread>

int32_t pinfer_machine_threads(void) {
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
        const unsigned n = std::thread::hardware_concurrency();  // more processors than the mask has bits
        return n > 4 ? (int32_t) n / 2 : n > 0 ? (int32_t) n : 1;
    }
    const int32_t n_allowed = CPU_COUNT(&allowed);
    if (n_allowed <= 4) {
        return n_allowed > 0 ? n_allowed : 1;
    }
    std::set<std::string> cores;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &allowed)) {
            continue;
        }
        char path[96];
        char siblings[256] = "";
        snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
        FILE * file = fopen(path, "r");
        if (file) {
            if (!fgets(siblings, sizeof(siblings), file)) {
                siblings[0] = '\0';
            }
            fclose(file);
        }
        cores.insert(siblings[0] ? siblings : std::to_string(cpu));
    }
    return (int32_t) cores.size();
}
