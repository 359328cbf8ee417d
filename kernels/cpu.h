// What the CPU's kernels share: a weight and its activations, threads, vectors. int4_cpu.cpp draws the layouts.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>

// clang checks the registers of `asm` before it knows the target of the function that this is inlined into
#if defined(__x86_64__) && !defined(__clang__) && !defined(PORTABLE_ONLY)
#define X86
#if __GNUC__ >= 10
#define X86_BF16  // older ones do not know it
#endif
#endif

#define ALWAYS_INLINE __attribute__((always_inline))  // or a vector might go through memory, or not, by another target
#define INLINE inline ALWAYS_INLINE
#define TARGET_AVX2 __attribute__((target("avx2,fma")))
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")))

constexpr int ROWS = 16;            // rows per block
constexpr int64_t CHUNK = 32;       // k that share a scale of the activations; divides every group

enum Kind { FP32, FP16, BF16, INT8 };  // INT8: of the KV cache alone
enum Isa { PORTABLE, AVX2, AVX512, AVX512_BF16 };  // the last differs in attention alone

struct Weight {
    const uint32_t* words;
    const void* scale;
    const uint8_t* zero;
    int64_t N, K, G;
    Kind scale_kind;
};

// 32 activations of a token: q is x / scale, its planes' bytes in the order in which the weight's words hold their k.
template <int PLANES>
struct Chunk {
    int8_t q[PLANES][CHUNK];
    float scale;
    int32_t start, sum;         // start: -zero * sum where all zero-points are the same, else 0
};

struct Matmul {
    Weight weight;
    const void* chunks;         // Chunk<PLANES>, M * K / 32: int4_cpu.cpp draws their order
    void* y;                    // (M, N), with rows `stride` apart
    int64_t M, stride;
    Kind y_kind;
};

struct Prepare {
    int64_t M, K;
    const void* x;              // (M, K)
    Kind x_kind;
    int32_t zero;               // that of symmetric weights, else 0
    void* chunks;
};

using Work = void (*)(void* job, int64_t first, int64_t last);  // some of a job's items

struct Instance {  // for one instruction set
    Work prepare[2][2], matmul[2][2];  // [0]: 4 bits, [1]: 8 bits; [0]: one plane, [1]: two
    Work dequantize[2], quantize;
};

__attribute__((visibility("hidden"))) const Instance& instance(int isa);

// ---- threads: torch's own OpenMP pool -------------------------------------------------------------------------------
// GOMP_parallel is what compilers emit for `#pragma omp parallel`; GNU's, Intel's and LLVM's runtimes all have it. It
// is left undefined here and found in the runtime that torch has loaded: a second one would spin against the first.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
extern "C" __attribute__((weak)) int omp_get_num_threads();
extern "C" __attribute__((weak)) int omp_get_thread_num();

struct Shared {
    Work work;
    void* job;
    int64_t count;
};

static inline void one_share(void* pointer) {
    const Shared& shared = *static_cast<const Shared*>(pointer);
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    shared.work(shared.job, shared.count * thread / threads, shared.count * (thread + 1) / threads);
}

// Each item is computed whole by one thread, so results do not depend on how many there are.
static inline void parallel(Work work, void* job, int64_t count, int threads) {
    Shared shared{work, job, count};
    if (threads > 1 && GOMP_parallel && omp_get_num_threads && omp_get_thread_num)
        GOMP_parallel(one_share, &shared, static_cast<unsigned>(threads), 0);
    else
        work(job, 0, count);
}

// ---- one source, three instruction sets -----------------------------------------------------------------------------
template <int W>
struct Lanes {
    typedef float F __attribute__((vector_size(4 * W)));
    typedef int32_t I __attribute__((vector_size(4 * W)));
    typedef uint32_t U __attribute__((vector_size(4 * W)));
    typedef uint16_t H __attribute__((vector_size(2 * W)));
    typedef uint16_t P __attribute__((vector_size(4 * W)));
    typedef uint8_t B __attribute__((vector_size(W)));
    typedef int8_t S __attribute__((vector_size(W)));
};

template <class V>
INLINE V load(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
INLINE void store(void* p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}

// Lanes of a and b by number: those of b come after those of a.
template <class V, class I>
INLINE V pick(V a, V b, I index) {
#ifdef __clang__
    constexpr int count = sizeof(I) / sizeof(index[0]);
    V result;
    for (int i = 0; i < count; i++) result[i] = index[i] < count ? a[index[i]] : b[index[i] - count];
    return result;
#else
    return __builtin_shuffle(a, b, index);
#endif
}

template <class F, int... I>
INLINE void each([[maybe_unused]] F f, std::integer_sequence<int, I...>) {
    (f(I), ...);
}

// f(0) .. f(N - 1), unrolled from the start: arrays whose indices become constants later than that stay in memory.
template <int N, class F>
INLINE void each(F f) {
    each(f, std::make_integer_sequence<int, N>{});
}

// W 16-bit numbers, or signed bytes, as 32-bit ones; compilers write each of these instructions as four, or as dozens.
template <int W>
INLINE typename Lanes<W>::U widen(const uint16_t* p) {
#ifdef X86
    if constexpr (W > 4) {
        typename Lanes<W>::U wide;
        asm("vpmovzxwd %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const uint16_t(*)[W]>(p)));
        return wide;
    }
#endif
    return __builtin_convertvector(load<typename Lanes<W>::H>(p), typename Lanes<W>::U);
}

template <int W>
INLINE typename Lanes<W>::I widen(const int8_t* p) {
#ifdef X86
    if constexpr (W > 4) {
        typename Lanes<W>::I wide;
        asm("vpmovsxbd %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const int8_t(*)[W]>(p)));
        return wide;
    }
#endif
    return __builtin_convertvector(load<typename Lanes<W>::S>(p), typename Lanes<W>::I);
}

// A number in all lanes. Of several, compilers make one vector, in memory, and load that: it waits for the stores.
template <class V, class Number>
INLINE V everywhere(const Number* number) {
    static_assert(sizeof *number == 4, "one lane");
#ifdef X86
    if constexpr (sizeof(V) > 16) {
        V all;
        asm("vbroadcastss %1, %0" : "=v"(all) : "m"(*number));
        return all;
    }
#endif
    return V{} + *number;
}

// W numbers of a kind as fp32, exactly.
template <int W>
INLINE typename Lanes<W>::F load_floats(const void* p, Kind kind, int64_t at) {
    using F = typename Lanes<W>::F;
    using U = typename Lanes<W>::U;
    if (kind == FP32) return load<F>(static_cast<const float*>(p) + at);
    if (kind == INT8) return __builtin_convertvector(widen<W>(static_cast<const int8_t*>(p) + at), F);
    const U half = widen<W>(static_cast<const uint16_t*>(p) + at);
    if (kind == BF16) return (F)(half << 16);
    const F magnitude = (F)((half & 0x7fff) << 13) * 0x1p112f;  // moves the exponent's bias from 15 to 127
    const U special = (U)((half & 0x7c00) == 0x7c00) & 0x7f800000;  // of infinity and NaN, which have no exponent
    return (F)((U)magnitude | special | (half & 0x8000) << 16);
}

template <int W>
INLINE typename Lanes<W>::I load_zero(const Weight& w, int64_t at) {
    return __builtin_convertvector(load<typename Lanes<W>::B>(w.zero + at), typename Lanes<W>::I);
}

// ---- small arithmetic -----------------------------------------------------------------------------------------------
template <int W>
INLINE typename Lanes<W>::I nearest(typename Lanes<W>::F v) {  // ties to even: 1.5 * 2^23 leaves no fraction bits
    return __builtin_convertvector((v + 0x1.8p23f) - 0x1.8p23f, typename Lanes<W>::I);
}

// The larger magnitudes, by their bits: as integers they are in order too, and infinity and NaN are above all others.
template <int W>
INLINE typename Lanes<W>::I larger(typename Lanes<W>::I most, typename Lanes<W>::F v) {
    const auto size = (typename Lanes<W>::I)v & 0x7fffffff;
    return size > most ? size : most;
}

// Lane i: what `of` makes of lanes i, i + LEFT, i + 2 LEFT, ...: halves with each other first.
template <int W, int LEFT = 1, int HALF = W / 2, class V, class Of>
INLINE V folded(V v, Of of) {
    if constexpr (HALF >= LEFT) {
        typename Lanes<W>::I other;
        for (int i = 0; i < W; i++) other[i] = (i + HALF) % W;
        return folded<W, LEFT, HALF / 2>(of(v, pick(v, v, other)), of);
    }
    return v;
}

template <int W>
INLINE float largest(typename Lanes<W>::I sizes) {
    using I = typename Lanes<W>::I;
    return ((typename Lanes<W>::F)folded<W>(sizes, [](I a, I b) ALWAYS_INLINE { return a > b ? a : b; }))[0];
}

// The largest magnitude of x (count).
template <int W>
INLINE float largest(const float* x, int64_t count) {
    typename Lanes<W>::I sizes{};
    for (int64_t i = 0; i < count; i += W) sizes = larger<W>(sizes, load<typename Lanes<W>::F>(x + i));
    return largest<W>(sizes);
}

INLINE uint16_t to_bf16(float value) {  // nearest, ties to even; NaN stays NaN
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 64);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// To the nearest bf16, as floats. Ties to even.
template <int W>
INLINE typename Lanes<W>::F to_bf16(typename Lanes<W>::F v) {
    const auto bits = (typename Lanes<W>::U)v;
    return (typename Lanes<W>::F)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}
