// INT4 and INT8 weight-only matmul for the CPU: y (M, N) = x (M, K) @ dequantised weight (N, K)^T, all sums in fp32.
//
// The layout. Rows are taken 16 at a time, so that one vector holds one word of each row and yields 16 outputs with no
// horizontal sum; 16 words are one cache line, one AVX-512 register, two AVX2 or four SSE / NEON registers.
//
//   words  [ceil(N / 16)] [K / 8] [16]      uint32 (8-bit codes: [K / 4]); rows past N are padding
//
//          row 0         row 1              row 15
//        +-------------+-------------+---+-------------+
//        | k = 0 .. 7  | k = 0 .. 7  |...| k = 0 .. 7  |   one word: 31 28       7  4 3  0  bit
//        +-------------+-------------+---+-------------+             +-----+- -+-----+-----+
//        | k = 8 .. 15 | k = 8 .. 15 |...| k = 8 .. 15 |             | k+7 |...| k+1 | k+0 |
//        +-------------+-------------+---+-------------+             +-----+- -+-----+-----+
//
//   scale  [ceil(N / 16)] [K / G] [16]      fp32, fp16 or bf16, as on disk
//   zero   [ceil(N / 16)] [K / G] [16]      uint8, or null: 8 (128 for 8-bit codes)
//
// A row's word is the disk's word (compressed-tensors), so packing only moves words.
//
// Every function below the line "one source, three instruction sets" is written once, on vectors of W floats, and
// compiled for AVX-512 (W = 16), AVX2 with FMA (W = 8) and the base instruction set of any machine (W = 4). The caller
// says which one; best_isa() knows which ones run here. There are no intrinsics, so it also builds for ARM.
#include <algorithm>
#include <cstdint>
#include <vector>

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int ROWS = 16;            // rows per block
constexpr int64_t K_CHUNK = 256;    // prefill: k per unpacked panel; 256 x 16 floats are half of a 32 KiB L1
constexpr int64_t TOKENS = 192;     // prefill: tokens per pass over the weights
constexpr int64_t L2_FLOATS = 1 << 16;  // prefill: activations that should stay in L2, 256 KiB
constexpr int PREFETCH = 512;       // words ahead, 2 KiB

enum Kind { FP32, FP16, BF16 };
enum Isa { PORTABLE, AVX2, AVX512 };

struct Weight {
    const uint32_t* words;
    const void* scale;
    const uint8_t* zero;
    int64_t N, K, G;
    Kind scale_kind;
};

struct Matmul {
    Weight weight;
    const float* x;             // (M, K)
    float* y;                   // (M, N rounded up to 16)
    int64_t M;
    std::vector<float> scaled;  // decode only: x in the scale of each code's place in its word, and
    std::vector<float> sums;    // the sum of x over each group
};

struct Dequantize {
    Weight weight;
    int64_t first_row;          // a multiple of 16
    int64_t last_row;
    void* out;                  // (last_row - first_row, K)
    Kind out_kind;
};

struct Quantize {
    const void* w;              // (N, K)
    Kind w_kind;
    int64_t N, K, G, candidates;
    const float* scale;         // (candidates, N, K / G)
    const uint8_t* zero;        // the same shape, or null
    int top;                    // the largest code
    uint8_t* q;                 // (N, K)
    uint8_t* best;              // (N, K / G): which candidate won
};

// ---- threads: torch's own OpenMP pool -------------------------------------------------------------------------------
// GOMP_parallel is what compilers emit for `#pragma omp parallel`; GNU's, Intel's and LLVM's runtimes all have it. It
// is left undefined here and found in the runtime that torch has loaded: a second one would spin against the first.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
extern "C" __attribute__((weak)) int omp_get_num_threads();
extern "C" __attribute__((weak)) int omp_get_thread_num();

using Work = void (*)(void* job, int64_t first, int64_t last);

struct Shared {
    Work work;
    void* job;
    int64_t count;
};

void one_share(void* pointer) {
    const Shared& shared = *static_cast<const Shared*>(pointer);
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    shared.work(shared.job, shared.count * thread / threads, shared.count * (thread + 1) / threads);
}

// Each item is computed whole by one thread, so results do not depend on how many there are.
void parallel(Work work, void* job, int64_t count, int threads) {
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
    typedef uint8_t B __attribute__((vector_size(W)));
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

// W numbers of a 16- or 32-bit kind as fp32, exactly.
template <int W>
INLINE typename Lanes<W>::F load_floats(const void* p, Kind kind, int64_t at) {
    using F = typename Lanes<W>::F;
    using U = typename Lanes<W>::U;
    if (kind == FP32) return load<F>(static_cast<const float*>(p) + at);
    const U half = __builtin_convertvector(load<typename Lanes<W>::H>(static_cast<const uint16_t*>(p) + at), U);
    if (kind == BF16) return (F)(half << 16);
    const F magnitude = (F)((half & 0x7fff) << 13) * 0x1p112f;  // moves the exponent's bias from 15 to 127
    return (F)((U)magnitude | (half & 0x8000) << 16);
}

template <int W>
INLINE typename Lanes<W>::F load_zero(const Weight& w, int64_t at, int bits) {
    using F = typename Lanes<W>::F;
    using I = typename Lanes<W>::I;
    if (!w.zero) return F{} + static_cast<float>(1 << (bits - 1));
    return __builtin_convertvector(__builtin_convertvector(load<typename Lanes<W>::B>(w.zero + at), I), F);
}

// ---- decode: one token ----------------------------------------------------------------------------------------------
// Code b of a word is masked where it stands, which leaves it times 2^(BITS b); x[b] carries the inverse power, so no
// shift is needed. The last code is shifted instead, because its top bit is the sign of an int32.
template <int W, int BITS>
INLINE typename Lanes<W>::F code_in_place(typename Lanes<W>::U word, int b) {
    using U = typename Lanes<W>::U;
    using I = typename Lanes<W>::I;
    constexpr uint32_t MASK = (1u << BITS) - 1;
    const U code = b == 32 / BITS - 1 ? word >> (32 - BITS) : word & (MASK << (BITS * b));
    return __builtin_convertvector((I)code, typename Lanes<W>::F);
}

void prepare_token(Matmul& job, int bits) {
    const int64_t K = job.weight.K, G = job.weight.G;
    const int per_word = 32 / bits;
    float power[8];
    for (int b = 0; b < per_word - 1; b++) power[b] = 1.0f / static_cast<float>(1u << (bits * b));
    power[per_word - 1] = 1.0f;
    job.scaled.resize(K);
    for (int64_t k = 0; k < K; k++) job.scaled[k] = job.x[k] * power[k % per_word];
    job.sums.resize(K / G);
    for (int64_t g = 0; g < K / G; g++) {
        float sum[ROWS] = {};  // partial sums, so that the compiler may use vectors
        for (int64_t k = g * G; k < (g + 1) * G; k += ROWS)
            for (int i = 0; i < ROWS; i++) sum[i] += job.x[k + i];
        for (int i = 0; i < ROWS; i++) job.sums[g] += sum[i];
    }
}

template <int W, int BITS>
INLINE void decode_block(const Matmul& job, int64_t block) {
    constexpr int P = ROWS / W, PER_WORD = 32 / BITS;
    constexpr int CHAINS = W / 4;  // independent sums per vector: hides the latency of the multiply-add
    using F = typename Lanes<W>::F;
    using U = typename Lanes<W>::U;
    const Weight& w = job.weight;
    const int64_t groups = w.K / w.G;
    const uint32_t* words = w.words + block * ROWS * (w.K / PER_WORD);
    const float* x = job.scaled.data();
    F y[P] = {};
    for (int64_t g = 0; g < groups; g++) {
        const int64_t at = (block * groups + g) * ROWS;
        F sum[P][CHAINS] = {};
        // sum of (q - zero) x = sum of q x - zero * sum of x
        for (int p = 0; p < P; p++) sum[p][0] = -load_zero<W>(w, at + p * W, BITS) * job.sums[g];
        for (int64_t k = 0; k < w.G; k += PER_WORD, words += ROWS, x += PER_WORD) {
            __builtin_prefetch(words + PREFETCH);
            U word[P];
            for (int p = 0; p < P; p++) word[p] = load<U>(words + p * W);
#pragma GCC unroll 8
            for (int b = 0; b < PER_WORD; b++)
#pragma GCC unroll 4
                for (int p = 0; p < P; p++) sum[p][b % CHAINS] += code_in_place<W, BITS>(word[p], b) * x[b];
        }
        for (int p = 0; p < P; p++) {
            for (int c = 1; c < CHAINS; c++) sum[p][0] += sum[p][c];
            y[p] += sum[p][0] * load_floats<W>(w.scale, w.scale_kind, at + p * W);
        }
    }
    for (int p = 0; p < P; p++) store(job.y + block * ROWS + p * W, y[p]);
}

// ---- prefill: many tokens -------------------------------------------------------------------------------------------
// panel (length, 16) = (q - zero) * scale for one block's k0 <= k < k0 + length
template <int W, int BITS>
INLINE void unpack_panel(const Weight& w, int64_t block, int64_t k0, int64_t length, float* panel) {
    constexpr int P = ROWS / W, PER_WORD = 32 / BITS;
    using F = typename Lanes<W>::F;
    using U = typename Lanes<W>::U;
    using I = typename Lanes<W>::I;
    const uint32_t* words = w.words + (block * (w.K / PER_WORD) + k0 / PER_WORD) * ROWS;
    for (int64_t k = k0; k < k0 + length; k += 32) {  // 32 divides every group
        const int64_t at = (block * (w.K / w.G) + k / w.G) * ROWS;
        F scale[P], zero[P];
        for (int p = 0; p < P; p++) scale[p] = load_floats<W>(w.scale, w.scale_kind, at + p * W);
        for (int p = 0; p < P; p++) zero[p] = load_zero<W>(w, at + p * W, BITS);
        for (int i = 0; i < 32 / PER_WORD; i++, words += ROWS) {
            __builtin_prefetch(words + PREFETCH);
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) {
                U word = load<U>(words + p * W);
#pragma GCC unroll 8
                for (int b = 0; b < PER_WORD; b++, word >>= BITS) {
                    const F code = __builtin_convertvector((I)(word & ((1u << BITS) - 1)), F);
                    store(panel + b * ROWS + p * W, (code - zero[p]) * scale[p]);
                }
            }
            panel += PER_WORD * ROWS;
        }
    }
}

// y (T, 16) += x (T, length) @ panel (length, 16); sums stay in registers
template <int W, int T>
INLINE void tile(const float* panel, const float* x, int64_t K, int64_t length, float* y, int64_t stride, bool fresh) {
    constexpr int P = ROWS / W;
    using F = typename Lanes<W>::F;
    F sum[T][P];
#pragma GCC unroll 16
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) sum[t][p] = fresh ? F{} : load<F>(y + t * stride + p * W);
    for (int64_t k = 0; k < length; k++) {
        F w[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) w[p] = load<F>(panel + k * ROWS + p * W);
#pragma GCC unroll 16
        for (int t = 0; t < T; t++)
#pragma GCC unroll 4
            for (int p = 0; p < P; p++) sum[t][p] += w[p] * x[t * K + k];
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; t++)
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) store(y + t * stride + p * W, sum[t][p]);
}

// y (count, 16) += x (count, length) @ panel, T tokens at a time; the rest is one narrower tile
template <int W, int T>
INLINE void tiles(const float* panel, const float* x, int64_t K, int64_t length, float* y, int64_t stride, bool fresh,
                  int64_t count) {
    for (; count >= T; count -= T, x += T * K, y += T * stride) tile<W, T>(panel, x, K, length, y, stride, fresh);
    if constexpr (T > 1)
        if (count > 0) tiles<W, T - 1>(panel, x, K, length, y, stride, fresh, count);
}

template <int W, int BITS>
INLINE void prefill_blocks(const Matmul& job, int64_t first, int64_t last) {
    constexpr int T = W == 16 ? 12 : W == 8 ? 6 : 2;  // as many sums as the registers hold
    const int64_t K = job.weight.K, stride = (job.weight.N + ROWS - 1) / ROWS * ROWS;
    std::vector<float> panel(K_CHUNK * ROWS);
    for (int64_t m0 = 0; m0 < job.M; m0 += TOKENS) {
        const int64_t m1 = std::min(m0 + TOKENS, job.M);
        const int64_t span = std::max(L2_FLOATS / (m1 - m0) / K_CHUNK, int64_t(1)) * K_CHUNK;
        for (int64_t k1 = 0; k1 < K; k1 += span)
            for (int64_t block = first; block < last; block++)
                for (int64_t k = k1; k < std::min(k1 + span, K); k += K_CHUNK) {
                    const int64_t length = std::min(K_CHUNK, K - k);
                    unpack_panel<W, BITS>(job.weight, block, k, length, panel.data());
                    tiles<W, T>(panel.data(), job.x + m0 * K + k, K, length, job.y + m0 * stride + block * ROWS, stride,
                                k == 0, m1 - m0);
                }
    }
}

template <int W, int BITS>
INLINE void matmul_blocks(const Matmul& job, int64_t first, int64_t last) {
    if (job.M > 1) return prefill_blocks<W, BITS>(job, first, last);
    for (int64_t block = first; block < last; block++) decode_block<W, BITS>(job, block);
}

// ---- the weight itself ----------------------------------------------------------------------------------------------
INLINE uint16_t to_bf16(float value) {  // nearest, ties to even; weights are finite
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <int W, int BITS>
INLINE void dequantize_blocks(const Dequantize& job, int64_t first, int64_t last) {
    const int64_t K = job.weight.K;
    float panel[K_CHUNK * ROWS];
    for (int64_t block = first; block < last; block++)
        for (int64_t k0 = 0; k0 < K; k0 += K_CHUNK) {
            const int64_t length = std::min(K_CHUNK, K - k0);
            const int64_t row0 = block * ROWS, rows = std::min<int64_t>(ROWS, job.last_row - job.first_row - row0);
            unpack_panel<W, BITS>(job.weight, job.first_row / ROWS + block, k0, length, panel);
            for (int64_t r = 0; r < rows; r++) {
                const int64_t at = (row0 + r) * K + k0;
                for (int64_t k = 0; k < length; k++)
                    if (job.out_kind == FP32)
                        static_cast<float*>(job.out)[at + k] = panel[k * ROWS + r];
                    else
                        static_cast<uint16_t*>(job.out)[at + k] = to_bf16(panel[k * ROWS + r]);
            }
        }
}

// ---- quantising -----------------------------------------------------------------------------------------------------
// code - zero of each weight: nearest, ties to even (adding 1.5 * 2^23 leaves no fraction bits), kept in the range
template <int W>
INLINE typename Lanes<W>::F steps(typename Lanes<W>::F w, float scale, float lowest, float highest) {
    using F = typename Lanes<W>::F;
    const F low = F{} + lowest, high = F{} + highest, magic = F{} + 0x1.8p23f;
    F t = w / scale;
    t = t < low ? low : t;
    t = t > high ? high : t;
    return (t + magic) - magic;
}

template <int W>
INLINE float squared_error(const float* w, int64_t G, float scale, float lowest, float highest) {
    using F = typename Lanes<W>::F;
    F sum[ROWS / W] = {};  // 16 partial sums in one order on every machine, so that all choose the same candidate
    for (int64_t k = 0; k < G; k += ROWS)
        for (int p = 0; p < ROWS / W; p++) {
            const F v = load<F>(w + k + p * W);
            const F d = v - steps<W>(v, scale, lowest, highest) * scale;
            sum[p] += d * d;
        }
    float error = 0;
    for (int i = 0; i < ROWS; i++) error += sum[i / W][i % W];
    return error;
}

template <int W>
INLINE void quantize_rows(const Quantize& job, int64_t first, int64_t last) {
    using F = typename Lanes<W>::F;
    using I = typename Lanes<W>::I;
    using B = typename Lanes<W>::B;
    const int64_t G = job.G, groups = job.K / G;
    std::vector<float> w(G);
    for (int64_t at = first * groups; at < last * groups; at++) {
        for (int64_t k = 0; k < G; k += W) store(&w[k], load_floats<W>(job.w, job.w_kind, at * G + k));
        float lowest = 0, scale = 0, least = 0;
        for (int64_t c = 0; c < job.candidates; c++) {
            const int64_t here = c * job.N * groups + at;
            const float zero = job.zero ? job.zero[here] : static_cast<float>((job.top + 1) / 2);
            const float error = squared_error<W>(w.data(), G, job.scale[here], -zero, job.top - zero);
            if (c > 0 && !(error < least)) continue;
            least = error, scale = job.scale[here], lowest = -zero;
            job.best[at] = static_cast<uint8_t>(c);
        }
        for (int64_t k = 0; k < G; k += W) {
            const F code = steps<W>(load<F>(&w[k]), scale, lowest, job.top + lowest) - lowest;
            store(job.q + at * G + k, __builtin_convertvector(__builtin_convertvector(code, I), B));
        }
    }
}

// ---- the instances, and choosing one at run time --------------------------------------------------------------------
struct Instance {
    Work matmul[2], dequantize[2];  // [0]: 4 bits, [1]: 8 bits
    Work quantize;
};

#define INSTANCE(NAME, TARGET, W)                                                                                      \
    template <int BITS>                                                                                                \
    TARGET void matmul_##NAME(void* job, int64_t first, int64_t last) {                                                \
        matmul_blocks<W, BITS>(*static_cast<Matmul*>(job), first, last);                                               \
    }                                                                                                                  \
    template <int BITS>                                                                                                \
    TARGET void dequantize_##NAME(void* job, int64_t first, int64_t last) {                                            \
        dequantize_blocks<W, BITS>(*static_cast<Dequantize*>(job), first, last);                                       \
    }                                                                                                                  \
    TARGET void quantize_##NAME(void* job, int64_t first, int64_t last) {                                              \
        quantize_rows<W>(*static_cast<Quantize*>(job), first, last);                                                   \
    }                                                                                                                  \
    constexpr Instance NAME{                                                                                           \
        {matmul_##NAME<4>, matmul_##NAME<8>}, {dequantize_##NAME<4>, dequantize_##NAME<8>}, quantize_##NAME};

INSTANCE(portable, , 4)
#if defined(__x86_64__) && !defined(PORTABLE_ONLY)
INSTANCE(avx2, __attribute__((target("avx2,fma"))), 8)
INSTANCE(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma"))), 16)
#endif

const Instance& instance(int isa) {
#if defined(__x86_64__) && !defined(PORTABLE_ONLY)
    if (isa == AVX512) return avx512;
    if (isa == AVX2) return avx2;
#endif
    (void)isa;
    return portable;
}

}  // namespace

// ---- the C interface; minichat/kernels/cpu.py is its only caller and checks every argument --------------------------
extern "C" {

int best_isa() {
#if defined(__x86_64__) && !defined(PORTABLE_ONLY)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

void matmul(const float* x, int64_t M, const uint32_t* words, const void* scale, int scale_kind, const uint8_t* zero,
            int64_t N, int64_t K, int64_t G, int bits, float* y, int isa, int threads) {
    Matmul job{{words, scale, zero, N, K, G, Kind(scale_kind)}, x, y, M, {}, {}};
    if (M == 1) prepare_token(job, bits);
    parallel(instance(isa).matmul[bits == 8], &job, (N + ROWS - 1) / ROWS, threads);
}

void dequantize(const uint32_t* words, const void* scale, int scale_kind, const uint8_t* zero, int64_t N, int64_t K,
                int64_t G, int bits, int64_t first_row, int64_t last_row, void* out, int out_kind, int isa,
                int threads) {
    Dequantize job{{words, scale, zero, N, K, G, Kind(scale_kind)}, first_row, last_row, out, Kind(out_kind)};
    parallel(instance(isa).dequantize[bits == 8], &job, (last_row - first_row + ROWS - 1) / ROWS, threads);
}

void quantize(const void* w, int w_kind, int64_t N, int64_t K, int64_t G, int64_t candidates, const float* scale,
              const uint8_t* zero, int bits, uint8_t* q, uint8_t* best, int isa, int threads) {
    Quantize job{w, Kind(w_kind), N, K, G, candidates, scale, zero, (1 << bits) - 1, q, best};
    parallel(instance(isa).quantize, &job, N, threads);
}

}  // extern "C"
