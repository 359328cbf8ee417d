// Attention of one token over the KV cache on the CPU: 4 query heads that share a key head, so that each key and value
// is read once for them. step_cpu.cpp calls it.
//
//   score    scores (seen, 4) = keys (seen, Hd) @ queries (4, Hd)^T, and the largest of each head
//   mix      out (4, Hd) = weights (seen, 4)^T @ values (seen, Hd), the weights e^(score - largest), and their sums
//
// One after the other over all keys that are seen: keys and values in turn, by an online softmax, are two streams out
// of memory, and slower by a tenth and more.
//
// AVX-512 reads a cache of bf16 at the speed of memory if its numbers are multiplied two at a time; one of signed bytes
// only if four are. AVX2 has an instruction for two 16-bit integers alone: it takes bytes so, and bf16 as floats. So
// there are three ways to multiply, of which each names the layouts that suit it: Floats, Pairs, Bytes.
#pragma once
#include <type_traits>

#include "cpu.h"

namespace {

constexpr int HEADS = 4;   // of those that share a key head, handled together: each key and value is read once for them
constexpr int BLOCK = 32;  // keys that are seen or not at a glance, and whose values stay near for all of Hd
constexpr int64_t AHEAD = 8192;  // bytes of keys or values that are asked for before they are used

// e^x for x <= 88, to 2e-7; 0 below -87. 2^n by its bits, and e^r for |r| <= ln 2 / 2 by its series.
template <int W>
INLINE typename Lanes<W>::F exponential(typename Lanes<W>::F x) {
    using F = typename Lanes<W>::F;
    using I = typename Lanes<W>::I;
    const I tiny = x < -87.0f;
    x = tiny ? F{} : x;
    const F n = (x * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;
    const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const F last = 1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720)));
    const F series = 1.0f + r * (1.0f + r * (0.5f + r * last));
    const F power = (F)((__builtin_convertvector(n, I) + 127) << 23);
    return tiny ? F{} : series * power;
}

// Lane i: what `of` makes of the lanes of i's head.
template <int W, class V, class Of>
INLINE V by_head(V v, Of of) {
    return folded<W, HEADS>(v, of);
}

// Sums of the lanes of N vectors: of all lanes, in the order of the vectors, if there are as many as lanes; of four
// vectors, (W / 4, 4), those of each four lanes. Each level halves their number: neighbours of two vectors side by
// side, first within four lanes (which costs less), then of fours.
template <int W, int LEVEL = 1, class V, int N>
INLINE V sums_of(V (&v)[N]) {
    typename Lanes<W>::I one, other;
    for (int i = 0; i < W; i++) {
        const int four = i / 4 * 4, at = i % 4, pair = i % (W / 2) / 4 * 8 + at;
        if (LEVEL == 1) one[i] = four + at / 2 + at % 2 * W, other[i] = one[i] + 2;
        if (LEVEL == 2) one[i] = four + at % 2 + at / 2 * W, other[i] = one[i] + 2;
        if (LEVEL > 2) one[i] = pair + (i < W / 2 ? 0 : W), other[i] = one[i] + 4;
    }
    each<(N >> LEVEL)>([&](int i) ALWAYS_INLINE {
        v[i] = pick(v[2 * i], v[2 * i + 1], one) + pick(v[2 * i], v[2 * i + 1], other);
    });
    if constexpr (2 << LEVEL <= N) return sums_of<W, LEVEL + 1>(v);
    return v[0];
}

// The scales of a block of keys, from k on; of keys past the last, its own again: no lane may be NaN that is not read.
INLINE const float* scales_of(const float* scales, int64_t k, int64_t seen, float (&room)[BLOCK]) {
    if (k + BLOCK <= seen) return scales + k;
    for (int i = 0; i < BLOCK; i++) room[i] = scales[std::min(k + i, seen - 1)];
    return room;
}

// Lane i: of W / 4 keys, what `of` makes of the number of its own.
template <int W, class Of>
INLINE auto by_key(Of of) {
    auto all = of(0);
    each<W / HEADS - 1>([&](int before) ALWAYS_INLINE {
        const int k = before + 1;
        typename Lanes<W>::I lane;
        for (int i = 0; i < W; i++) lane[i] = i < k * HEADS ? i : W + i;
        all = pick(all, of(k), lane);
    });
    return all;
}

template <int W>
INLINE typename Lanes<W>::F by_key(const float* numbers) {
    return by_key<W>([&](int k) ALWAYS_INLINE { return everywhere<typename Lanes<W>::F>(numbers + k); });
}

// What makes integers up to `top` of numbers up to `most`: 0 if there are none to make.
INLINE float inverse_of(float top, float most) { return most > 0x1p-100f && most < __builtin_inff() ? top / most : 0; }

constexpr int64_t size_of(Kind kind) { return kind == FP32 ? 4 : kind == BF16 ? 2 : 1; }

// Asks for the lines of COUNT numbers of a cache that are AHEAD of the at-th, unless they begin past the end; of less
// than a line, for the same one again. Between the arithmetic, a few at a time: a core that has asked for as many lines
// as it can (12 or so) does nothing else.
template <Kind KIND, int COUNT>
INLINE void fetch(const void* cache, int64_t at, int64_t end) {
    const int64_t bytes = at * size_of(KIND) + AHEAD;
    if (bytes >= end * size_of(KIND)) return;
    each<(COUNT * size_of(KIND) + 63) / 64>([&](int line) ALWAYS_INLINE {
        __builtin_prefetch(static_cast<const char*>(cache) + bytes + line * 64, 0, 3);
    });
}

// ---- three ways to multiply -----------------------------------------------------------------------------------------
// The scores of 4 heads lie side by side: (keys, 4), W / 4 keys to a vector. These are the products of as many keys:
// rows[i] is where the i-th begins.
template <class Of>
INLINE typename Of::F products_of(const typename Of::Number* q, int64_t Hd, const void* keys, const int64_t* rows,
                                  int64_t end) {
    constexpr int W = Of::W, KEYS = W / HEADS;
    typename Of::Sum sum[W] = {};
    for (int64_t d = 0; d < Hd; d += 2 * W) {
        fetch<Of::KIND, KEYS * 2 * W>(keys, rows[0] + KEYS * d, end);
        decltype(Of::load(keys, d)) key[KEYS];
        each<KEYS>([&](int i) ALWAYS_INLINE { key[i] = Of::load(keys, rows[i] + d); });
        each<HEADS * KEYS>([&](int at) ALWAYS_INLINE {
            const int h = at / KEYS, i = at % KEYS;
            Of::multiply(sum[i * HEADS + h], key[i], q + Of::at(h, d, Hd));
        });
    }
    return __builtin_convertvector(sums_of<W>(sum), typename Of::F);
}

// As floats; those of bf16 are two halves of words, the even ones and the odd ones.
template <int WIDTH, Kind CACHE>
struct Floats {
    static constexpr int W = WIDTH, TOGETHER = 1, PARTS = 2;  // keys whose values are mixed at once, in vectors
    static constexpr Kind KIND = CACHE;
    using F = typename Lanes<W>::F;
    using U = typename Lanes<W>::U;
    using Number = float;  // of a query
    using Word = float;    // the weights of TOGETHER keys
    using Sum = F;
    struct Numbers {
        F part[PARTS];
    };

    static constexpr int place(int i) { return KIND == BF16 ? i % 2 * W + i / 2 : i; }  // of PARTS W numbers in `part`

    static constexpr int64_t at(int64_t h, int64_t d, int64_t Hd) { return h * Hd + d; }  // of 2 W numbers of a query

    // The query (Hd) of the h-th head to where `products` reads it; returns what those are to be multiplied with.
    static INLINE float query(const float* q, int64_t Hd, int64_t h, Number* out) {
        for (int64_t d = 0; d < Hd; d += 2 * W)
            for (int i = 0; i < 2 * W; i++) out[at(h, d, Hd) + place(i)] = q[d + i];
        return 1;
    }

    static INLINE F products(const Number* q, int64_t Hd, const void* keys, const int64_t* rows, int64_t end) {
        return products_of<Floats>(q, Hd, keys, rows, end);
    }

    static INLINE Numbers load(const void* cache, int64_t at) {
        if (KIND != BF16) return {load_floats<W>(cache, KIND, at), load_floats<W>(cache, KIND, at + W)};
        const U words = ::load<U>(static_cast<const uint16_t*>(cache) + at);
        return {(F)(words << 16), (F)(words & 0xffff0000)};
    }

    static INLINE void multiply(Sum& sum, const Numbers& key, const Number* query) {
        sum += key.part[0] * ::load<F>(query);
        sum += key.part[1] * ::load<F>(query + W);
    }

    static INLINE F rounded(F weights) { return weights; }

    static INLINE const Word* words(const float* weights, Word*, float*) { return weights; }

    static INLINE Numbers values(const void* cache, const int64_t* rows) { return load(cache, rows[0]); }

    static INLINE void mix(Sum& sum, F value, Word weight) { sum += value * weight; }

    static INLINE F total(Sum sum, float) { return sum; }
};

#ifdef X86
// As 16-bit numbers, of which one instruction multiplies neighbours and adds them up: bf16 with queries and weights in
// bf16, as attention in bf16 has them on any device; bytes with queries and weights of 15 bits, in integers.
template <int WIDTH, Kind CACHE>
struct Pairs {
    static constexpr int W = WIDTH, TOGETHER = 2, PARTS = 2;
    static constexpr Kind KIND = CACHE;
    static constexpr float TOP = 16383;  // 2^14 * 127 * 1,024 of Hd fit into 32 bits
    using F = typename Lanes<W>::F;
    using I = typename Lanes<W>::I;
    using U = typename Lanes<W>::U;
    using H = typename Lanes<W>::H;
    using V = typename Lanes<W>::P;
    using Number = uint16_t;
    using Word = uint32_t;
    using Sum = std::conditional_t<KIND == BF16, F, I>;
    struct Numbers {
        V part[PARTS];
    };

    // `values` takes 4 neighbours of one key and of the next in turn, for the first vector and for the second
    static constexpr int place(int i) { return i / 4 % 2 * W + i / 8 * 4 + i % 4; }

    // queries [Hd / 2 W] [4 heads] [2 W]: one pointer goes through them
    static constexpr int64_t at(int64_t h, int64_t d, int64_t) { return d * HEADS + h * 2 * W; }

    static INLINE float query(const float* q, int64_t Hd, int64_t h, Number* out) {
        const float most = largest<W>(q, Hd), inverse = KIND == BF16 ? 1 : inverse_of(TOP, most);
        for (int64_t d = 0; d < Hd; d += W) {
            const F v = ::load<F>(q + d);
            const U whole = KIND == BF16 ? (U)to_bf16<W>(v) >> 16 : (U)nearest<W>(v * inverse);
            const int64_t half = d % (2 * W);
            store(out + at(h, d - half, Hd) + half, __builtin_convertvector(whole, H));
        }
        return KIND == BF16 ? 1 : most / TOP;
    }

    static INLINE F products(const Number* q, int64_t Hd, const void* keys, const int64_t* rows, int64_t end) {
        return products_of<Pairs>(q, Hd, keys, rows, end);
    }

    static INLINE V load(const void* cache, int64_t at) {
        if (KIND == BF16) return ::load<V>(static_cast<const uint16_t*>(cache) + at);
        V wide;
        asm("vpmovsxbw %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const int8_t(*)[2 * W]>(
            static_cast<const int8_t*>(cache) + at)));
        return wide;
    }

    static INLINE void multiply(Sum& sum, V key, const Number* query) {
        if constexpr (W == 16) {
            multiply(sum, ::load<V>(query), key);
        } else {  // from memory: one instruction less
            V products;
            asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
                : "+x"(sum), "=&x"(products) : "x"(key), "m"(*reinterpret_cast<const Number(*)[2 * W]>(query)));
        }
    }

    static INLINE void multiply(Sum& sum, V a, V b) {
        if constexpr (W == 16 && KIND == BF16) {
            asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        } else if constexpr (W == 16) {
            asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        } else {  // in one piece: compilers put off the additions, and then every product takes a register, or memory
            V products;
            asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "x"(b));
        }
    }

    static INLINE F rounded(F weights) { return KIND == BF16 ? to_bf16<W>(weights) : weights; }

    // weights (BLOCK, 4) -> (BLOCK / 2, 4) of two keys each, and by head what sums of integers are to be multiplied by
    static INLINE const Word* words(const float* weights, Word* out, float* scales) {
        const F inverse = inverses(weights, TOP, scales);
        I first, second;  // lanes of each two keys in two vectors
        for (int i = 0; i < W; i++) first[i] = i / HEADS * 2 * HEADS + i % HEADS, second[i] = first[i] + HEADS;
        for (int k = 0; k < BLOCK * HEADS; k += 2 * W) {
            const F a = ::load<F>(weights + k), b = ::load<F>(weights + k + W);
            const F one = pick(a, b, first), other = pick(a, b, second);
            if (KIND == BF16)
                store(out + k / 2, (U)one >> 16 | (U)other);
            else
                store(out + k / 2, nearest<W>(one * inverse) | nearest<W>(other * inverse) << 16);
        }
        return out;
    }

    // what makes integers up to `top` of weights (BLOCK, 4), in the lanes of each head; scales[h]: what undoes it
    static INLINE F inverses(const float* weights, float top, float* scales) {
        I most{};
        for (int k = 0; k < BLOCK * HEADS; k += W) most = larger<W>(most, ::load<F>(weights + k));
        most = by_head<W>(most, [](I a, I b) ALWAYS_INLINE { return a > b ? a : b; });
        float all[W];
        store(all, (F)most / top);
        std::copy(all, all + HEADS, scales);
        const I usable = ((F)most > 0x1p-100f) & (most < 0x7f800000);
        return usable ? top / (F)most : F{};
    }

    static INLINE Numbers values(const void* cache, const int64_t* rows) {
        V low, high;
#pragma GCC unroll 32
        for (int i = 0; i < 2 * W; i++) {
            low[i] = i / 8 * 8 + i % 8 / 2 + (i % 2 ? 2 * W : 0);
            high[i] = low[i] + 4;
        }
        const V one = load(cache, rows[0]), other = load(cache, rows[1]);
        return {pick(one, other, low), pick(one, other, high)};
    }

    static INLINE void mix(Sum& sum, V value, Word weights) { multiply(sum, value, (V)(U{} + weights)); }

    static INLINE F total(Sum sum, float scale) {
        if constexpr (KIND == BF16) return sum;
        else return __builtin_convertvector(sum, F) * scale;
    }
};

// As signed bytes, of which one instruction multiplies four with unsigned ones and adds them up: queries and weights of
// 8 bits too. 16 numbers of each of the 4 heads lie in one vector, and 16 of a key are broadcast to all of them: a
// key's sums are then in four lanes a head, not in sixteen.
//
//   queries  [Hd / 16] [4 heads] [16]    int8
//   start    [4 heads] [4]               int32: -128 * sum of the query, since keys are taken as key + 128
struct Bytes : Pairs<16, INT8> {
    static constexpr int TOGETHER = 4, PARTS = 4;
    using Number = int8_t;
    struct Numbers {
        U part[PARTS];
    };

    // `values` takes 4 neighbours of four keys in turn, for each of four vectors
    static constexpr int place(int i) { return i % 16 / 4 * 16 + i / 16 * 4 + i % 4; }

    static INLINE float query(const float* q, int64_t Hd, int64_t h, Number* out) {
        const float most = largest<W>(q, Hd), inverse = inverse_of(127, most);
        int32_t start[4] = {};
        for (int64_t d = 0; d < Hd; d += W) {
            const I whole = inverse > 0 ? nearest<W>(::load<F>(q + d) * inverse) : I{};
            for (int i = 0; i < W; i++) start[i % 4] -= 128 * whole[i];
            store(out + d * HEADS + h * 16, __builtin_convertvector(whole, Lanes<W>::B));
        }
        __builtin_memcpy(out + Hd * HEADS + h * 16, start, sizeof start);
        return most / 127;
    }

    static INLINE F products(const Number* q, int64_t Hd, const void* keys, const int64_t* rows, int64_t end) {
        U sum[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[i] = ::load<U>(q + Hd * HEADS);
        for (int64_t d = 0; d < Hd; d += 16) {
            fetch<INT8, 4 * 16>(keys, rows[0] + 4 * d, end);
            const U query = ::load<U>(q + d * HEADS);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                U key;
                asm("vbroadcasti32x4 %1, %0" : "=v"(key) : "m"(*reinterpret_cast<const int8_t(*)[16]>(
                    static_cast<const int8_t*>(keys) + rows[i] + d)));
                sum[i] = add(sum[i], key ^ 0x80808080, query);
            }
        }
        const I sums = (I)sums_of<W>(sum);  // (4 heads, 4 keys), to (4 keys, 4 heads)
        I other;
        for (int i = 0; i < 16; i++) other[i] = i % 4 * 4 + i / 4;
        return __builtin_convertvector(pick(sums, sums, other), F);
    }

    // weights (BLOCK, 4) -> (BLOCK / 4, 4) of four keys each
    static INLINE const Word* words(const float* weights, Word* out, float* scales) {
        const F inverse = inverses(weights, 255, scales);
        U shift;
        for (int i = 0; i < W; i++) shift[i] = i / HEADS * 8;
        for (int k = 0; k < BLOCK * HEADS; k += W) {
            U word = (U)nearest<W>(::load<F>(weights + k) * inverse) << shift;
            word = by_head<W>(word, [](U a, U b) ALWAYS_INLINE { return a | b; });
            __builtin_memcpy(out + k / 4, &word, 4 * HEADS);
        }
        return out;
    }

    static INLINE Numbers values(const void* cache, const int64_t* rows) {
        typedef uint8_t V __attribute__((vector_size(64)));
        typedef uint16_t P __attribute__((vector_size(64)));
        V low, high;
        P low2, high2;
#pragma GCC unroll 64
        for (int i = 0; i < 64; i++) low[i] = i / 16 * 16 + i % 16 / 2 + (i % 2 ? 64 : 0), high[i] = low[i] + 8;
#pragma GCC unroll 32
        for (int i = 0; i < 32; i++) low2[i] = i / 8 * 8 + i % 8 / 2 + (i % 2 ? 32 : 0), high2[i] = low2[i] + 4;
        V key[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) key[i] = ::load<V>(static_cast<const int8_t*>(cache) + rows[i]);
        const P a = (P)pick(key[0], key[1], low), b = (P)pick(key[2], key[3], low);
        const P c = (P)pick(key[0], key[1], high), d = (P)pick(key[2], key[3], high);
        return {{(U)pick(a, b, low2), (U)pick(a, b, high2), (U)pick(c, d, low2), (U)pick(c, d, high2)}};
    }

    static INLINE void mix(Sum& sum, U value, Word weights) { sum = (Sum)add((U)sum, U{} + weights, value); }

    static INLINE U add(U sum, U unsigned_bytes, U bytes) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(bytes));
        return sum;
    }
};
#endif

// ---- a token's attention --------------------------------------------------------------------------------------------
// Whether all of a block's keys are seen (255), or none (0).
INLINE bool all_are(const uint8_t* sees, uint8_t value) {
    uint8_t other = 0;
    for (int i = 0; i < BLOCK; i++) other |= sees[i] ^ value;
    return other == 0;
}

// The scores of W / 4 keys; -inf where one is not seen.
template <int W>
INLINE typename Lanes<W>::F only_seen(typename Lanes<W>::F scores, const uint8_t* sees) {
    using I = typename Lanes<W>::I;
    const I seen = by_key<W>([&](int k) ALWAYS_INLINE { return I{} - (sees[k] != 0); });
    return seen ? scores : typename Lanes<W>::F{} - __builtin_inff();
}

// scores (whole blocks of keys, 4) of the queries with the keys that begin at `at`, times `by`, which has a lane for
// each head; -inf where a key is not seen. Returns the largest of each head, in its lanes.
template <class Of>
INLINE typename Of::F score(const typename Of::Number* q, typename Of::F by, const void* keys, int64_t at, int64_t seen,
                            int64_t Hd, const uint8_t* sees, const float* scales, float* scores) {
    using F = typename Of::F;
    constexpr int W = Of::W, KEYS = W / HEADS;
    const int64_t end = at + seen * Hd;
    F most = F{} - __builtin_inff();
    for (int64_t first = 0; first < seen; first += BLOCK, sees += BLOCK, scores += BLOCK * HEADS) {
        if (all_are(sees, 0)) {
            std::fill(scores, scores + BLOCK * HEADS, -__builtin_inff());
            continue;
        }
        float room[BLOCK];
        const float* scale = Of::KIND == INT8 ? scales_of(scales, first, seen, room) : nullptr;
        const bool all = all_are(sees, 255);
        int64_t row = at + first * Hd;
        for (int k = 0; k < BLOCK; k += KEYS, row += KEYS * Hd) {
            int64_t rows[KEYS];  // of keys past the last, its own again
            each<KEYS>([&](int i) ALWAYS_INLINE { rows[i] = std::min(row + i * Hd, end - Hd); });
            F found = Of::products(q, Hd, keys, rows, end) * by;
            if (Of::KIND == INT8) found *= by_key<W>(scale + k);
            if (!all) found = only_seen<W>(found, sees + k);
            store(scores + k * HEADS, found);
            most = found > most ? found : most;
        }
    }
    return by_head<W>(most, [](F a, F b) ALWAYS_INLINE { return a > b ? a : b; });
}

// out (4, Hd) = weights (seen, 4)^T @ values (seen, Hd), the weights e^(score - most); of bytes, times the scales of
// the values. Some keys at a time, and of those P times PARTS vectors at a time. `out` has them in the order of
// Of::place, not yet divided by the sums of the weights, which are returned.
template <class Of, int P>
INLINE typename Of::F mix(const float* scores, typename Of::F most, const void* values, int64_t at, int64_t seen,
                          int64_t Hd, const float* scales, float* out) {
    using F = typename Of::F;
    constexpr int W = Of::W, KEYS = W / HEADS, TOGETHER = Of::TOGETHER, PARTS = Of::PARTS, COLUMNS = P * PARTS * W;
    std::fill(out, out + HEADS * Hd, 0.0f);
    F sums{};
    for (int64_t first = 0; first < seen; first += BLOCK, scores += BLOCK * HEADS) {
        float weights[BLOCK * HEADS], room[BLOCK], undo[HEADS] = {};
        const float* scale = Of::KIND == INT8 ? scales_of(scales, first, seen, room) : nullptr;
        for (int k = 0; k < BLOCK; k += KEYS) {
            // of bytes, the first 1,024 here already, or memory would have nothing to do meanwhile
            if (Of::KIND == INT8) fetch<INT8, KEYS * 32>(values, at + first * Hd + k * 32, at + seen * Hd);
            const F e = Of::rounded(exponential<W>(load<F>(scores + k * HEADS) - most));
            sums += e;
            store(weights + k * HEADS, Of::KIND == INT8 ? e * by_key<W>(scale + k) : e);
        }
        typename Of::Word words_room[BLOCK * HEADS / 2];
        const auto* words = Of::words(weights, words_room, undo);
        const int64_t end = at + std::min(first + BLOCK, seen) * Hd;
        int64_t next = at + first * Hd;  // in order, though values are not read so
        for (int64_t d = 0; d < Hd; d += COLUMNS) {
            typename Of::Sum sum[HEADS][P][PARTS] = {};
            const auto* word = words;
            for (int64_t row = at + first * Hd; row < end; row += TOGETHER * Hd, word += HEADS) {
                fetch<Of::KIND, TOGETHER * COLUMNS>(values, next, at + seen * Hd);
                next += TOGETHER * COLUMNS;
                each<P>([&](int i) ALWAYS_INLINE {
                    int64_t rows[TOGETHER];  // of keys past the last, its own again
                    each<TOGETHER>([&](int j) ALWAYS_INLINE {
                        rows[j] = (j ? std::min(row + j * Hd, end - Hd) : row) + d + i * PARTS * W;
                    });
                    const auto value = Of::values(values, rows);
                    each<HEADS * PARTS>([&](int which) ALWAYS_INLINE {
                        const int h = which / PARTS, part = which % PARTS;
                        Of::mix(sum[h][i][part], value.part[part], word[h]);
                    });
                });
            }
            each<HEADS * P * PARTS>([&](int which) ALWAYS_INLINE {
                const int h = which / (P * PARTS), p = which % (P * PARTS);
                float* to = out + h * Hd + d + p * W;
                store(to, load<F>(to) + Of::total(sum[h][p / PARTS][p % PARTS], undo[h]));
            });
        }
    }
    return by_head<W>(sums, [](F a, F b) ALWAYS_INLINE { return a + b; });
}

}  // namespace
