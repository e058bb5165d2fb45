// Tests the calls that csrc/cuda/device.h makes to the CUDA runtime, once per kernel and device and once per launch,
// with a runtime that records them.
#include "../../csrc/cuda/device.h"

#include <cstdio>
#include <thread>

namespace {

void kernel(int) {}
void other(int) {}

int count(const char* name) {
    int found = 0;
    for (const auto& call : runtime::calls) found += call.name == name;
    return found;
}

// Launches a kernel as a tensor-core family does.
void start(void (*which)(int), int cluster, int shared_bytes, void* stream) {
    fm::cuda::allow_shared_memory(which, 200000);
    int most = fm::cuda::resident_clusters(which, cluster, 384, shared_bytes);
    fm::cuda::launch_cluster(which, most, cluster, 384, shared_bytes, stream, 7);
}

#define CHECK(condition)                                                                                               \
    if (!(condition)) return fprintf(stderr, "line %d: %s\n", __LINE__, #condition), 1

} // namespace

int main() {
    int stream = 0;
    start(kernel, 2, 150000, &stream);
    CHECK(count("allow") == 1 && count("carve-out") == 1 && count("occupancy") == 1 && count("launch") == 1);
    CHECK(runtime::calls[0].value == 200000 && runtime::calls.back().stream == &stream);
    CHECK(runtime::calls.back().cluster == 2 && runtime::calls.back().value == 100 &&
          runtime::calls.back().shared_bytes == 150000);

    // A later call, which a graph may capture, is a launch on the caller's stream and nothing else.
    runtime::calls.clear();
    start(kernel, 2, 150000, &stream);
    CHECK(runtime::calls.size() == 1 && runtime::calls[0].name == "launch" && runtime::calls[0].stream == &stream);

    // Another launch configuration is queried once, and does not reduce the allowed shared memory.
    runtime::calls.clear();
    start(kernel, 1, 100000, nullptr);
    CHECK(count("allow") == 0 && count("occupancy") == 1 && count("launch") == 1);
    CHECK(runtime::calls.back().cluster == 0 && runtime::calls.back().value == 100); // no cluster attribute

    // Other kernels and other devices have their own permission and occupancy.
    runtime::calls.clear();
    start(other, 2, 150000, nullptr);
    runtime::device = 1;
    start(kernel, 2, 150000, nullptr);
    CHECK(count("allow") == 2 && count("occupancy") == 2);
    CHECK(runtime::calls[0].kernel == reinterpret_cast<void*>(&other) && runtime::calls.back().device == 1);
    runtime::device = 0;

    // Host threads launch one kernel with different sizes: every launch is allowed its size.
    runtime::calls.clear();
    std::thread threads[8];
    for (int t = 0; t < 8; ++t)
        threads[t] = std::thread([t] {
            runtime::device = 2 + t % 2;
            for (int i = 0; i < 500; ++i) start(kernel, 1 + i % 2, 1000 * (t + 1), nullptr);
        });
    for (auto& thread : threads) thread.join();
    CHECK(count("allow") == 2 && count("launch") == 4000);
    for (int device = 2; device < 4; ++device) {
        bool allowed = false;
        for (const auto& call : runtime::calls) {
            if (call.device != device) continue;
            allowed |= call.name == "allow";
            CHECK(call.name != "launch" || allowed);
        }
    }

    // The launch of the portable kernels: no grid of zero blocks, no grid that is too large, and errors are thrown.
    runtime::calls.clear();
    fm::cuda::launch(kernel, 0, 128, nullptr, 1);
    CHECK(runtime::calls.empty());
    fm::cuda::launch(kernel, 5, 128, &stream, 1);
    CHECK(runtime::calls.size() == 1 && runtime::calls[0].value == 5 && runtime::calls[0].cluster == 0);
    int thrown = 0;
    try {
        fm::cuda::launch(kernel, int64_t{1} << 31, 128, nullptr, 1);
    } catch (const std::runtime_error&) {
        ++thrown;
    }
    runtime::next_launch = cudaErrorFake;
    try {
        fm::cuda::launch(kernel, 1, 128, nullptr, 1);
    } catch (const std::runtime_error& error) {
        thrown += std::string(error.what()).find("a fake error") != std::string::npos;
    }
    CHECK(thrown == 2);
    CHECK(!runtime::loaded_in_capture && runtime::capture_mode == cudaStreamCaptureModeGlobal);
    return 0;
}
