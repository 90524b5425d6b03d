// Runs a kernel on the host, block after block, a thread a thread: what tests hold the CUDA C against its CPU passes with.
//
// Standard input says what is launched: the kernel's name, the number of blocks, and the arguments, each a letter with a number:
// `b` bytes of memory, `c` a count, or `n` the bits of a float; a line each. The contents of the memory follow, in order, and
// go to standard output when the kernel is through.
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

struct Index {
    unsigned int x;
};
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;
static std::barrier<> *threads_of_block;

#define __global__
#define __device__ static inline
#define __shared__ static
#define __syncthreads() threads_of_block->arrive_and_wait()
static unsigned int __float_as_uint(float value) {
    unsigned int bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
static float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
static void atomicAdd(unsigned int *sum, unsigned int value) { __atomic_fetch_add(sum, value, __ATOMIC_RELAXED); }

#include "espalier.cu"

struct Arguments {
    std::vector<void *> pointers;
    std::vector<count_t> counts;
    std::vector<float> numbers;
};
// The types of a kernel's parameters say how many arguments of each kind it takes, in which order they may stand.
template <typename T> static T taken(Arguments &given, size_t &pointer, size_t &count, size_t &number) {
    if constexpr (std::is_pointer_v<T>) {
        return (T)given.pointers.at(pointer++);
    } else if constexpr (std::is_same_v<T, float>) {
        return given.numbers.at(number++);
    } else {
        return given.counts.at(count++);
    }
}
template <typename... T> static void call(void (*kernel)(T...), Arguments given) {
    size_t pointer = 0, count = 0, number = 0;
    // Braces evaluate from left to right.
    std::tuple<T...> arguments{taken<T>(given, pointer, count, number)...};
    if (pointer != given.pointers.size() || count != given.counts.size() || number != given.numbers.size()) {
        std::fprintf(stderr, "the kernel takes other arguments\n");
        std::exit(1);
    }
    std::apply(kernel, arguments);
}

#define KERNEL(name) {#name, [](Arguments given) { call(name, given); }}
static const std::map<std::string, std::function<void(Arguments)>> KERNELS = {
    KERNEL(accumulate), KERNEL(accumulate_sums), KERNEL(reversed), KERNEL(identity), KERNEL(mirror_upper), KERNEL(count_digits),
    KERNEL(find_digit), KERNEL(keep_from), KERNEL(keep_n_of_m), KERNEL(admm_right), KERNEL(admm_update), KERNEL(conjugate_step),
    KERNEL(sweep), KERNEL(causal_softmax),
};

int main() {
    char name[64];
    unsigned int blocks, count;
    if (std::scanf("%63s %u %u", name, &blocks, &count) != 3 || KERNELS.find(name) == KERNELS.end()) {
        std::fprintf(stderr, "there is no such kernel\n");
        return 1;
    }
    Arguments given;
    std::vector<std::vector<char>> memory;
    for (unsigned int index = 0; index < count; index++) {
        char kind;
        unsigned long long value;
        if (std::scanf(" %c %llu", &kind, &value) != 2) {
            return 1;
        }
        if (kind == 'b') {
            memory.emplace_back(value);
        } else if (kind == 'c') {
            given.counts.push_back(value);
        } else {
            unsigned int bits = (unsigned int)value;
            float number;
            std::memcpy(&number, &bits, sizeof number);
            given.numbers.push_back(number);
        }
    }
    std::getchar();
    for (auto &bytes : memory) {
        if (std::fread(bytes.data(), 1, bytes.size(), stdin) != bytes.size()) {
            return 1;
        }
        given.pointers.push_back(bytes.data());
    }
    blockDim.x = THREADS;
    gridDim.x = blocks;
    std::barrier<> barrier(THREADS);
    threads_of_block = &barrier;
    const auto kernel = KERNELS.at(name);
    std::vector<std::thread> threads;
    for (unsigned int thread = 0; thread < THREADS; thread++) {
        threads.emplace_back([=] {
            threadIdx.x = thread;
            for (unsigned int block = 0; block < blocks; block++) {
                blockIdx.x = block;
                kernel(given);
                // What a block shares is the next one's too.
                threads_of_block->arrive_and_wait();
            }
        });
    }
    for (auto &thread : threads) {
        thread.join();
    }
    for (auto &bytes : memory) {
        std::fwrite(bytes.data(), 1, bytes.size(), stdout);
    }
    return 0;
}
