// INT4 and INT8 weight-only matmul for the CPU: y (M, N) = x (M, K) @ dequantised weight (N, K)^T, in integers.
//
// The weight. Rows are taken 16 at a time, so that one vector holds one word of each row and yields 16 outputs with no
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
// A row's word is the disk's word (compressed-tensors), so packing only moves words. Its even codes are the bytes of
// word & 0x0f0f0f0f, its odd ones those of word >> 4 & 0x0f0f0f0f: what an instruction takes that multiplies four
// unsigned bytes with four signed ones and adds the products up.
//
// The activations. Each token's x is rounded to integers, 32 of K at a time, with a scale for each chunk: to one plane
// of signed bytes (8 bits, an error of about 5e-3), or to two, 128 * high + low (15 bits, 4e-5: "exact"). Then
//
//   y[n] = sum over chunks of  scale[n] * x_scale * (sum of q[n][k] * x[k]  -  zero[n] * sum of x[k])
//
// where all between the parentheses are integers, and each chunk is added up in fp32. The order of those sums depends
// on nothing but K, so that a row's outputs are the same in every batch and on every number of threads.
//
// Some tokens, a tile, are multiplied with a weight's chunk together, and lie together: all that a product reads of
// them is at fixed distances from one pointer, which goes on and on:
//
//   chunks [M / tile] [K / 32] [tile]       tile: 1, 2, 4 or 16, as many as there are registers for; what is left
//                                           over of M is in tiles of half the size, a quarter, ...
//
// Every function but the product is written once, on vectors of W floats (cpu.h), and compiled for AVX-512 with VNNI
// (W = 16), AVX2 with FMA (W = 8) and the base instruction set of any machine (W = 4, also on ARM). The caller says
// which one; best_isa() knows which ones run here.
#include <vector>

#include "cpu.h"

namespace {

constexpr int64_t K_PANEL = 256;    // dequantise: k per panel of 16 rows
constexpr int64_t L2_BYTES = 1 << 20;   // activations that should stay in L2 while weights pass by
// Words ahead that are asked for: into the first cache and, earlier, into the second. Intel's cores, which wait for a
// dozen lines at a time, ask once for each, into both. By NEAR and FAR a token in int8 takes 1.05 times as long there;
// on AVX2, where several tokens have NEAR alone, those take 1.7 times as long.
constexpr int NEAR = 1024, FAR = 4096, ONCE = 768;
#ifdef X86
const bool INTEL = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
#else
constexpr bool INTEL = false;
#endif

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
    const uint8_t* zero;        // the same shape
    int top;                    // the largest code
    uint8_t* q;                 // (N, K)
    uint8_t* best;              // (N, K / G): which candidate won
};

// ---- tiles: the tokens that are multiplied with a weight's chunk together -------------------------------------------
// As many as there are registers for their sums; AVX2's are those of Products.
template <int W, int BITS, int PLANES>
constexpr int TOKENS = W == 16 ? 16 : W == 8 ? 16 / (BITS * PLANES) : 2;

struct Tile {
    int64_t first, size;
};

// That of token m of M: T tokens each, and those left over in tiles of half the size, and half of that, ...
template <int T>
INLINE Tile tile_of(int64_t m, int64_t M) {
    int64_t size = T;
    while (m / size * size + size > M) size /= 2;
    return {m / size * size, size};
}

// ---- activations to integers ----------------------------------------------------------------------------------------
template <int W>
INLINE void to_bytes(int8_t* out, const typename Lanes<W>::I (&q)[CHUNK / W], int bits) {
    typedef int8_t Bytes __attribute__((vector_size(CHUNK)));
    using U = typename Lanes<W>::U;
    Bytes bytes, order;
    if constexpr (W == 8) {  // what is stored in four pieces cannot be loaded as one before all are in the cache
        bytes = (Bytes)(((U)q[0] & 255) | ((U)q[1] & 255) << 8 | ((U)q[2] & 255) << 16 | (U)q[3] << 24);
    } else {
        int8_t narrow[CHUNK];
        for (int i = 0; i < CHUNK / W; i++)
            store(narrow + i * W, __builtin_convertvector(q[i], typename Lanes<W>::B));
        bytes = load<Bytes>(narrow);
    }
    for (int i = 0; i < CHUNK; i++) {
        const int k = bits == 4 ? i / 8 * 8 + i % 4 * 2 + i / 4 % 2 : i;  // of 8, the even ones first
        order[i] = static_cast<int8_t>(W == 8 ? k % 8 * 4 + k / 8 : k);
    }
    store(out, pick(bytes, bytes, order));
}

template <int W, int PLANES>
INLINE void prepare_chunk(const Prepare& job, int64_t at, int bits, Chunk<PLANES>& chunk) {
    using F = typename Lanes<W>::F;
    using I = typename Lanes<W>::I;
    constexpr int V = CHUNK / W;
    constexpr float TOP = PLANES == 1 ? 127 : 126 * 128;
    F v[V];
    I sizes{};
    each<V>([&](int i) ALWAYS_INLINE {
        v[i] = load_floats<W>(job.x, job.x_kind, at + i * W);
        sizes = larger<W>(sizes, v[i]);
    });
    const float most = largest<W>(sizes), up = most < 0x1p-60f ? 0x1p60f : 1;  // no reciprocal overflows
    const bool finite = most < __builtin_inff();
    const float inverse = finite && most > 0 ? TOP / (most * up) : 0;
    chunk.scale = finite ? most / TOP : __builtin_nanf("");
    I q[V], low[V], sum{};
    each<V>([&](int i) ALWAYS_INLINE {
        q[i] = finite ? nearest<W>(v[i] * up * inverse) : I{};
        sum += q[i];
        if (PLANES == 1) return;
        const I high = (q[i] + 64) >> 7;
        low[i] = q[i] - (high << 7);
        q[i] = high;
    });
    to_bytes<W>(chunk.q[0], q, bits);
    if constexpr (PLANES == 2) to_bytes<W>(chunk.q[1], low, bits);
    chunk.sum = folded<W>(sum, [](I a, I b) ALWAYS_INLINE { return a + b; })[0];
    chunk.start = -job.zero * chunk.sum;
}

template <int W, int BITS, int PLANES>
INLINE void prepare_chunks(const Prepare& job, int64_t first, int64_t last) {
    const int64_t per_row = job.K / CHUNK;
    while (first < last) {
        const int64_t m = first / per_row, row = m * per_row, end = std::min(last, row + per_row);
        const auto [start, size] = tile_of<TOKENS<W, BITS, PLANES>>(m, job.M);
        auto* out = static_cast<Chunk<PLANES>*>(job.chunks) + start * per_row + m - start;
        for (; first < end; first++) prepare_chunk<W>(job, first * CHUNK, BITS, out[(first - row) * size]);
    }
}

// ---- the product ----------------------------------------------------------------------------------------------------
// What AVX-512 and AVX2 have for it is written as assembly: intrinsics exist only in functions of one target.

// W rows' sums of 32 products: eight times four unsigned codes a row, with four signed bytes that all rows share; plus
// `start`.
template <int W>
struct Dot {
    using I = typename Lanes<W>::I;
    using U = typename Lanes<W>::U;

    static INLINE I of(const U (&codes)[8], const int8_t* x, I sum) {
        for (int i = 0; i < 8; i++)
            for (int b = 0; b < 4; b++) sum += (I)(codes[i] >> (8 * b) & 255) * x[4 * i + b];
        return sum;
    }
};

#ifdef X86
template <>
struct Dot<16> {
    using I = Lanes<16>::I;
    using U = Lanes<16>::U;

    static INLINE I of(const U (&codes)[8], const int8_t* x, I sum) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) add(sum, codes[i], x + 4 * i);
        return sum;
    }

    static INLINE void add(I& sum, U codes, const int8_t* x) {
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const int32_t(*)[1]>(x)));
    }
};
#endif

template <int W, int BITS>
INLINE void unpack_chunk(const uint32_t* words, typename Lanes<W>::U (&codes)[8]) {
    using U = typename Lanes<W>::U;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        if (BITS == 8) {
            codes[i] = load<U>(words + i * ROWS);
        } else {
            const U word = load<U>(words + i / 2 * ROWS);
            codes[i] = (i % 2 ? word >> 4 : word) & 0x0f0f0f0fu;
        }
    }
}

// T tokens' products with one chunk of 16 rows, in integers: take(token, which W of the rows, their sums + start).
template <int W, int BITS, int PLANES, int T>
struct Products {
    using I = typename Lanes<W>::I;

    template <class Take>
    static INLINE void of(const uint32_t* words, const Chunk<PLANES>* x, Take take) {
        each<ROWS / W>([&](int p) ALWAYS_INLINE {
            typename Lanes<W>::U codes[8];
            unpack_chunk<W, BITS>(words + p * W, codes);
            each<T>([&](int t) ALWAYS_INLINE {
                I dot = Dot<W>::of(codes, x[t].q[PLANES - 1], everywhere<I>(&x[t].start));
                if (PLANES == 2) dot += Dot<W>::of(codes, x[t].q[0], I{}) << 7;
                take(t, p, dot);
            });
        });
    }
};

#ifdef X86
// AVX2 adds up two products, in 16 bits: at most 3810 with a code below 16, so that eight such pairs fit. A code of 8
// bits is taken as two of 4, with a sum for each. Eight of the 16 registers hold sums, so each word's codes serve all
// tokens before the next word is unpacked.
template <int BITS, int PLANES, int T>
struct Products<8, BITS, PLANES, T> {
    using I = Lanes<8>::I;
    using U = Lanes<8>::U;
    typedef int16_t Pairs __attribute__((vector_size(32)));

    template <class Take>
    static INLINE void of(const uint32_t* words, const Chunk<PLANES>* x, Take take) {
        Pairs sums[T][PLANES][BITS / 4][2];
        each<BITS>([&](int i) ALWAYS_INLINE {
            each<2>([&](int high) ALWAYS_INLINE {  // the half of each byte
                const int k = BITS == 4 ? 8 * i + 4 * high : 4 * i;
                const U left = load<U>(words + i * ROWS) >> 4 * high & 0x0f0f0f0fu;
                const U right = load<U>(words + i * ROWS + 8) >> 4 * high & 0x0f0f0f0fu;
                each<T * PLANES>([&](int at) ALWAYS_INLINE {
                    const int t = at / PLANES, plane = at % PLANES;
                    Pairs(&sum)[2] = sums[t][plane][BITS == 4 ? 0 : high];
                    const U four = U{} + load<uint32_t>(x[t].q[plane] + k);
                    if (k == 0) {
                        sum[0] = products(left, four), sum[1] = products(right, four);
                    } else {
                        add_products(sum[0], left, four), add_products(sum[1], right, four);
                    }
                });
            });
        });
        each<T * 2>([&](int at) ALWAYS_INLINE {
            const int t = at / 2, p = at % 2;
            I dot = total(sums[t][PLANES - 1], p) + x[t].start;
            if (PLANES == 2) dot += total(sums[t][0], p) << 7;
            take(t, p, dot);
        });
    }

    static INLINE Pairs products(U codes, U x) {
        Pairs result;
        asm("vpmaddubsw %2, %1, %0" : "=x"(result) : "x"(codes), "x"(x));
        return result;
    }

    // In one piece: compilers put off the additions, and then every product takes a register, or memory.
    static INLINE void add_products(Pairs& sum, U codes, U x) {
        Pairs more;
        asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(more) : "x"(codes), "x"(x));
    }

    static INLINE I total(const Pairs (&sums)[BITS / 4][2], int p) {
        if constexpr (BITS == 4)
            return in_32_bits(sums[0][p]);
        else
            return in_32_bits(sums[0][p]) + (in_32_bits(sums[1][p]) << 4);
    }

    static INLINE I in_32_bits(Pairs sums) {
        const Pairs one = Pairs{} + 1;
        I result;
        asm("vpmaddwd %2, %1, %0" : "=x"(result) : "x"(sums), "x"(one));
        return result;
    }
};
#endif

// y (T, 16) = x (T, K) @ 16 rows of the weight; each chunk of them is unpacked once for all T tokens. One block after
// the other, so that all words are one stream, in order: several blocks side by side are up to a quarter slower.
// SYMMETRIC: the weight has no zero-points; else w.zero tells.
template <int W, int BITS, int PLANES, int T, bool SYMMETRIC>
INLINE void tile(const Weight& w, int64_t block, const Chunk<PLANES>* x, float (*y)[ROWS]) {
    constexpr int P = ROWS / W;
    using F = typename Lanes<W>::F;
    using I = typename Lanes<W>::I;
    const int64_t chunks = w.K / CHUNK, per_group = w.G / CHUNK, groups = w.K / w.G;
    const uint32_t* words = w.words + block * chunks * BITS * ROWS;
    F sum[T][P] = {};
    constexpr bool IN_MEMORY = W == 8 && T * P == 8;  // these sums and Products' own would take all registers
    for (int64_t g = 0; g < groups; g++) {
        F scale[P];
        I zero[P] = {};
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) {
            const int64_t at = (block * groups + g) * ROWS + p * W;
            scale[p] = load_floats<W>(w.scale, w.scale_kind, at);
            if (!SYMMETRIC && w.zero) zero[p] = load_zero<W>(w, at);
        }
        for (int64_t c = 0; c < per_group; c++, x += T, words += ROWS * BITS) {
            constexpr bool IDLE = W == 16 || T * PLANES == 1;  // else the arithmetic leaves no time for more
            if (INTEL) {
                each<BITS>([&](int i) ALWAYS_INLINE { __builtin_prefetch(words + ONCE + i * ROWS, 0, 3); });
            } else {
                each<BITS>([&](int i) ALWAYS_INLINE {
                    if (IDLE) __builtin_prefetch(words + FAR + i * ROWS, 0, 2);
                    __builtin_prefetch(words + NEAR + i * ROWS, 0, 0);  // a token reads them once: nothing to keep
                });
            }
            Products<W, BITS, PLANES, T>::of(words, x, [&](int t, int p, I dot) ALWAYS_INLINE {
                if (!SYMMETRIC && w.zero) dot -= zero[p] * x[t].sum;
                sum[t][p] += __builtin_convertvector(dot, F) * (scale[p] * x[t].scale);
                if constexpr (IN_MEMORY) asm("" : "+m"(sum[t][p]));
            });
        }
    }
    each<T * P>([&](int at) ALWAYS_INLINE { store(y[at / P] + at % P * W, sum[at / P][at % P]); });
}

// T tokens at a time; the rest in tiles of half the size
template <int W, int BITS, int PLANES, int T>
INLINE void tiles(const Matmul& job, int64_t block, int64_t first, int64_t last) {
    const int64_t rows = std::min<int64_t>(ROWS, job.weight.N - block * ROWS);
    const auto* x = static_cast<const Chunk<PLANES>*>(job.chunks);
    for (; last - first >= T; first += T) {
        float y[T][ROWS];
        const auto* these = x + first * (job.weight.K / CHUNK);
        if (W > 4 && !job.weight.zero)  // a test at each product costs up to a tenth
            tile<W, BITS, PLANES, T, (W > 4)>(job.weight, block, these, y);
        else
            tile<W, BITS, PLANES, T, false>(job.weight, block, these, y);
        for (int t = 0; t < T; t++)
            for (int64_t r = 0; r < rows; r++) {
                const int64_t at = (first + t) * job.stride + block * ROWS + r;
                if (job.y_kind == FP32)
                    static_cast<float*>(job.y)[at] = y[t][r];
                else
                    static_cast<uint16_t*>(job.y)[at] = to_bf16(y[t][r]);
            }
    }
    if constexpr (T > 1) tiles<W, BITS, PLANES, T / 2>(job, block, first, last);
}

template <int W, int BITS, int PLANES>
INLINE void matmul_blocks(const Matmul& job, int64_t first, int64_t last) {
    constexpr int T = TOKENS<W, BITS, PLANES>;
    const int64_t per_token = job.weight.K / CHUNK * static_cast<int64_t>(sizeof(Chunk<PLANES>));
    const int64_t tokens = std::max<int64_t>(1, L2_BYTES / per_token / T) * T;
    for (int64_t m = 0; m < job.M; m += tokens)
        for (int64_t block = first; block < last; block++)
            tiles<W, BITS, PLANES, T>(job, block, m, std::min(m + tokens, job.M));
}

// ---- the weight itself ----------------------------------------------------------------------------------------------
// panel (length, 16) = (q - zero) * scale for one block's k0 <= k < k0 + length
template <int W, int BITS>
INLINE void unpack_panel(const Weight& w, int64_t block, int64_t k0, int64_t length, float* panel) {
    constexpr int P = ROWS / W, PER_WORD = 32 / BITS;
    using F = typename Lanes<W>::F;
    using I = typename Lanes<W>::I;
    using U = typename Lanes<W>::U;
    const uint32_t* words = w.words + (block * (w.K / PER_WORD) + k0 / PER_WORD) * ROWS;
    for (int64_t k = k0; k < k0 + length; k += CHUNK) {
        const int64_t at = (block * (w.K / w.G) + k / w.G) * ROWS;
        F scale[P];
        I zero[P];
        for (int p = 0; p < P; p++) {
            scale[p] = load_floats<W>(w.scale, w.scale_kind, at + p * W);
            zero[p] = w.zero ? load_zero<W>(w, at + p * W) : I{} + (1 << (BITS - 1));
        }
        for (int i = 0; i < BITS; i++, words += ROWS, panel += PER_WORD * ROWS)
            for (int p = 0; p < P; p++) {
                U word = load<U>(words + p * W);
#pragma GCC unroll 8
                for (int b = 0; b < PER_WORD; b++, word >>= BITS) {
                    const I code = (I)(word & ((1u << BITS) - 1));
                    store(panel + b * ROWS + p * W, __builtin_convertvector(code - zero[p], F) * scale[p]);
                }
            }
    }
}

template <int W, int BITS>
INLINE void dequantize_blocks(const Dequantize& job, int64_t first, int64_t last) {
    const int64_t K = job.weight.K;
    float panel[K_PANEL * ROWS];
    for (int64_t block = first; block < last; block++)
        for (int64_t k0 = 0; k0 < K; k0 += K_PANEL) {
            const int64_t length = std::min(K_PANEL, K - k0);
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
            const float zero = job.zero[here];
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
#define INSTANCE(NAME, TARGET, W)                                                                                      \
    template <int BITS, int PLANES>                                                                                    \
    TARGET void prepare_##NAME(void* job, int64_t first, int64_t last) {                                               \
        prepare_chunks<W, BITS, PLANES>(*static_cast<Prepare*>(job), first, last);                                     \
    }                                                                                                                  \
    template <int BITS, int PLANES>                                                                                    \
    TARGET void matmul_##NAME(void* job, int64_t first, int64_t last) {                                                \
        matmul_blocks<W, BITS, PLANES>(*static_cast<Matmul*>(job), first, last);                                       \
    }                                                                                                                  \
    template <int BITS>                                                                                                \
    TARGET void dequantize_##NAME(void* job, int64_t first, int64_t last) {                                            \
        dequantize_blocks<W, BITS>(*static_cast<Dequantize*>(job), first, last);                                       \
    }                                                                                                                  \
    TARGET void quantize_##NAME(void* job, int64_t first, int64_t last) {                                              \
        quantize_rows<W>(*static_cast<Quantize*>(job), first, last);                                                   \
    }                                                                                                                  \
    constexpr Instance NAME{                                                                                           \
        {{prepare_##NAME<4, 1>, prepare_##NAME<4, 2>}, {prepare_##NAME<8, 1>, prepare_##NAME<8, 2>}},                  \
        {{matmul_##NAME<4, 1>, matmul_##NAME<4, 2>}, {matmul_##NAME<8, 1>, matmul_##NAME<8, 2>}},                      \
        {dequantize_##NAME<4>, dequantize_##NAME<8>},                                                                  \
        quantize_##NAME};

INSTANCE(portable, , 4)
#ifdef X86
INSTANCE(avx2, TARGET_AVX2, 8)
INSTANCE(avx512, TARGET_AVX512, 16)
#endif

}  // namespace

const Instance& instance(int isa) {
#ifdef X86
    if (isa >= AVX512) return avx512;
    if (isa == AVX2) return avx2;
#endif
    (void)isa;
    return portable;
}

// ---- the C interface; minichat/kernels/cpu.py is its only caller and checks every argument --------------------------
extern "C" {

int best_isa() {
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
#ifdef X86_BF16
        if (__builtin_cpu_supports("avx512bf16")) return AVX512_BF16;
#endif
        return AVX512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

// chunks: scratch of M * K / 32 * (32 * planes + 12) bytes
void matmul(const void* x, int x_kind, int64_t M, int planes, void* chunks, const uint32_t* words, const void* scale,
            int scale_kind, const uint8_t* zero, int64_t N, int64_t K, int64_t G, int bits, void* y, int y_kind,
            int isa, int threads) {
    Prepare prepare{M, K, x, Kind(x_kind), zero ? 0 : 1 << (bits - 1), chunks};
    Matmul job{{words, scale, zero, N, K, G, Kind(scale_kind)}, chunks, y, M, N, Kind(y_kind)};
    parallel(instance(isa).prepare[bits == 8][planes == 2], &prepare, M * (K / CHUNK), M > 1 ? threads : 1);
    parallel(instance(isa).matmul[bits == 8][planes == 2], &job, (N + ROWS - 1) / ROWS, threads);
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
