// All blocks of the model for a few tokens on the CPU, in one call: norms, INT4 matmuls, RoPE, attention over the
// rolling cache, SwiGLU. It computes what minichat/model.py does; a reader may skip it, and so may a device.
//
// A token of a 7B is 32 blocks of 7 matmuls. From Python each of them, and every norm and rotation between, costs more
// than its arithmetic, and threads that wait for one Python thread wait longer still. Here they stay together from the
// embeddings to the last norm and meet at a barrier between one sum over all columns and the next:
//
//   norm, to integers | q k v | RoPE, into the cache, attention | to integers | o, + x |
//   norm, to integers | gate up, SwiGLU               | to integers | down, + x |
//
// Each output is computed whole by one thread in an order that depends on neither their number nor the batch, so that
// a token has the same logits alone and among others: a draft checked in one batch is what greedy decoding would say.
#include <cmath>
#include <type_traits>
#include <utility>

#include "int4_cpu.cpp"

extern "C" __attribute__((weak)) void GOMP_barrier();

namespace {

struct Layer {
    Weight q, k, v, o, gate, up, down;
    const float *norm1, *norm2;     // (D)
    void *keys, *values;            // (B, KvH, slots, Hd)
    float *key_scales, *value_scales;  // (B, KvH, slots), of a cache of signed bytes
};

struct Step {
    const Layer* layers;
    int64_t count;                  // of layers
    int64_t B, T;                   // sequences, and tokens of each
    int64_t D, H, KvH, Hd, inner;
    int64_t slots, seen, column;    // of the cache; how many hold something after this; where the first token goes
    int64_t window;                 // 0: none
    int64_t bits, planes, cache_kind;
    double eps;
    const float* norm;              // (D), the last
    const float *cos, *sin;         // (B T, Hd)
    const int64_t* positions;       // (B, slots), before these tokens
    const int64_t* new_positions;   // (B, T)
    float* x;                       // (B T, D): embeddings, then hidden states
    uint8_t* scratch;
};

constexpr int HEADS = 4;   // of those that share a key head, handled together: each key and value is read once for them
constexpr int BLOCK = 32;  // keys whose values are used in turn for all of Hd, from the nearest cache

// ---- scratch: everything that a step writes, in one piece of memory that is there already ---------------------------
struct Scratch {
    float *h, *qkv, *attended, *gate, *up;  // (M, D), (M, (H + 2 KvH) Hd), (M, H Hd), (M, inner) twice
    uint8_t* chunks;
    float *scores, *queries, *mixed;        // of each thread (stride, HEADS), (HEADS, Hd) twice
    uint8_t* sees;                          // (M, stride): 255 for the keys that a token sees, else 0
    int64_t stride, bytes;

    Scratch(const Step& s, int threads) {
        const int64_t M = s.B * s.T, widest = std::max(s.inner, std::max(s.D, s.H * s.Hd));
        bytes = 0;
        auto take = [&](int64_t count) {
            uint8_t* here = s.scratch + bytes;
            bytes += (count + 63) / 64 * 64;
            return here;
        };
        h = reinterpret_cast<float*>(take(4 * M * s.D));
        const int64_t before = bytes;
        qkv = reinterpret_cast<float*>(take(4 * M * (s.H + 2 * s.KvH) * s.Hd));
        attended = reinterpret_cast<float*>(take(4 * M * s.H * s.Hd));
        const int64_t after = std::exchange(bytes, before);  // gate and up lie where those did
        gate = reinterpret_cast<float*>(take(4 * M * s.inner));
        up = reinterpret_cast<float*>(take(4 * M * s.inner));
        bytes = std::max(bytes, after);
        chunks = take(M * widest / CHUNK * static_cast<int64_t>(sizeof(Chunk<2>)));
        stride = (s.slots + BLOCK - 1) / BLOCK * BLOCK;
        scores = reinterpret_cast<float*>(take(4 * threads * HEADS * stride));
        queries = reinterpret_cast<float*>(take(4 * threads * HEADS * s.Hd));
        mixed = reinterpret_cast<float*>(take(4 * threads * HEADS * s.Hd));
        sees = take(M * stride);
    }
};

struct Range {
    int64_t first, last;

    Range(int64_t count, int64_t thread, int64_t threads)
        : first(count * thread / threads), last(count * (thread + 1) / threads) {}
};

// ---- small arithmetic -----------------------------------------------------------------------------------------------
template <int W>
INLINE float horizontal(typename Lanes<W>::F v) {
    float sum[W];
    store(sum, v);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) sum[i] += sum[i + half];
    return sum[0];
}

// e^x for x <= 88, to 2e-7; 0 below -87. 2^n by its bits, and e^r for |r| <= ln 2 / 2 by its series.
template <int W>
INLINE typename Lanes<W>::F exponential(typename Lanes<W>::F x) {
    using F = typename Lanes<W>::F;
    using I = typename Lanes<W>::I;
    const I tiny = x < -87.0f;
    x = tiny ? F{} : x;
    const F n = (x * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;
    const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const F series = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r / 720)))));
    const F power = (F)((__builtin_convertvector(n, I) + 127) << 23);
    return tiny ? F{} : series * power;
}

// out (last - first) of a row of D: x / rms(x) * weight
template <int W>
INLINE void normalise(const float* x, const float* weight, double eps, int64_t D, int64_t first, int64_t last,
                      float* out) {
    using F = typename Lanes<W>::F;
    F squares{};
    for (int64_t d = 0; d < D; d += W) {
        const F v = load<F>(x + d);
        squares += v * v;
    }
    const float scale = 1 / __builtin_sqrtf(horizontal<W>(squares) / static_cast<float>(D) + static_cast<float>(eps));
    for (int64_t d = first; d < last; d += W) store(out + d, load<F>(x + d) * scale * load<F>(weight + d));
}

INLINE void rotate(float* x, const float* cos, const float* sin, int64_t Hd) {
    for (int64_t i = 0; i < Hd / 2; i++) {
        const float a = x[i], b = x[i + Hd / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + Hd / 2] = b * cos[i + Hd / 2] + a * sin[i + Hd / 2];
    }
}

// A key or value of one token and head into its slot; a scale of bytes is their largest magnitude / 127, or NaN or
// infinity if there is one among them, and the bytes are 0 then.
template <Kind KIND>
INLINE void keep(void* cache, float* scales, int64_t slot, const float* values, int64_t Hd) {
    float largest = 0;
    for (int64_t i = 0; KIND == INT8 && i < Hd; i++)
        if (std::abs(values[i]) > largest || values[i] != values[i]) largest = std::abs(values[i]);
    const float inverse = largest > 0x1p-100f ? 127 / largest : 0;
    if (KIND == INT8) scales[slot] = largest / 127;
    for (int64_t i = 0; i < Hd; i++)
        if (KIND == FP32)
            static_cast<float*>(cache)[slot * Hd + i] = values[i];
        else if (KIND == BF16)
            static_cast<uint16_t*>(cache)[slot * Hd + i] = to_bf16(values[i]);
        else
            static_cast<int8_t*>(cache)[slot * Hd + i] =
                inverse > 0 ? static_cast<int8_t>(std::nearbyint(values[i] * inverse)) : int8_t(0);
}

// ---- attention: two ways to multiply 2 W numbers of a cache ----------------------------------------------------------
// The scores of 4 heads lie side by side: (keys, 4), W / 4 keys to a vector.
constexpr int AHEAD = 32;  // keys or values that are asked for before they are used

// Lane i: what `of` makes of the lanes of i's head.
template <int W, class V, class Of>
INLINE V by_head(V v, Of of) {
    for (int half = W / 2; half >= HEADS; half /= 2) {
        typename Lanes<W>::I other;
        for (int i = 0; i < W; i++) other[i] = (i + half) % W;
        v = of(v, pick(v, v, other));
    }
    return v;
}

// To the nearest bf16, as floats. Ties to even.
template <int W>
INLINE typename Lanes<W>::F to_bf16(typename Lanes<W>::F v) {
    const auto bits = (typename Lanes<W>::U)v;
    return (typename Lanes<W>::F)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000);
}

// As floats; those of bf16 are two halves of words, the even ones and the odd ones.
template <int WIDTH, Kind CACHE>
struct Floats {
    static constexpr int W = WIDTH, TOGETHER = 1;  // keys whose values are mixed at once
    static constexpr Kind KIND = CACHE;
    using F = typename Lanes<W>::F;
    using U = typename Lanes<W>::U;
    using Number = float;  // of a query
    using Word = float;    // the weights of TOGETHER keys
    using Sum = F;
    struct Numbers {
        F part[2];
    };

    static constexpr int place(int i) { return KIND == BF16 ? i % 2 * W + i / 2 : i; }  // of 2 W numbers in `part`

    // (Hd) as `load` has them; returns what sums of products with them are to be multiplied with
    static INLINE float query(const float* q, int64_t Hd, Number* out) {
        for (int64_t d = 0; d < Hd; d += 2 * W)
            for (int i = 0; i < 2 * W; i++) out[d + place(i)] = q[d + i];
        return 1;
    }

    static INLINE Numbers load(const void* cache, int64_t at) {
        if (KIND != BF16) return {load_floats<W>(cache, KIND, at), load_floats<W>(cache, KIND, at + W)};
        const U words = ::load<U>(static_cast<const uint16_t*>(cache) + at);
        return {(F)(words << 16), (F)(words & 0xffff0000)};
    }

    static INLINE Numbers load(const Number* query) { return {::load<F>(query), ::load<F>(query + W)}; }

    static INLINE Sum multiply(Sum sum, const Numbers& a, const Numbers& b) {
        sum += a.part[0] * b.part[0];
        sum += a.part[1] * b.part[1];
        return sum;
    }

    static INLINE F rounded(F weights) { return weights; }

    static INLINE const Word* words(const float* weights, Word*, float*) { return weights; }

    static INLINE Numbers values(const void* cache, int64_t at, int64_t) { return load(cache, at); }

    static INLINE Sum mix(Sum sum, F value, Word weight) { return sum + value * weight; }

    static INLINE F total(Sum sum, float) { return sum; }
};

#ifdef X86
// As 16-bit numbers, of which one instruction multiplies neighbours and adds them up: bf16 with queries and weights in
// bf16, as attention in bf16 has them on any device; bytes with queries and weights of 15 bits, in integers.
template <int WIDTH, Kind CACHE>
struct Pairs {
    static constexpr int W = WIDTH, TOGETHER = 2;
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
        V part[2];
    };

    // `values` takes 4 neighbours of one key and of the next in turn, for the first vector and for the second
    static constexpr int place(int i) { return i / 4 % 2 * W + i / 8 * 4 + i % 4; }

    static INLINE float query(const float* q, int64_t Hd, Number* out) {
        I most{};  // as integers, magnitudes are in order too, and infinity and NaN are above all others
        for (int64_t d = 0; d < Hd; d += W) {
            const I size = ::load<I>(q + d) & 0x7fffffff;
            most = size > most ? size : most;
        }
        int32_t bits = 0;
        for (int i = 0; i < W; i++) bits = std::max(bits, most[i]);
        float largest;
        __builtin_memcpy(&largest, &bits, sizeof largest);
        const float inverse = largest > 0x1p-100f && bits < 0x7f800000 ? TOP / largest : 0;
        for (int64_t d = 0; d < Hd; d += W) {
            const F v = ::load<F>(q + d);
            const U whole = KIND == BF16 ? (U)to_bf16<W>(v) >> 16 : (U)nearest<W>(v * inverse);
            store(out + d, __builtin_convertvector(whole, H));
        }
        return KIND == BF16 ? 1 : largest / TOP;
    }

    static INLINE V load(const void* cache, int64_t at) {
        if (KIND == BF16) return ::load<V>(static_cast<const uint16_t*>(cache) + at);
        V wide;
        asm("vpmovsxbw %1, %0" : "=v"(wide) : "m"(*reinterpret_cast<const int8_t(*)[2 * W]>(
            static_cast<const int8_t*>(cache) + at)));
        return wide;
    }

    static INLINE V load(const Number* query) { return ::load<V>(query); }

    static INLINE Sum multiply(Sum sum, V a, V b) {
        if constexpr (W == 16 && KIND == BF16) {
            asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        } else if constexpr (W == 16) {
            asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
        } else {
            I products;
            asm("vpmaddwd %2, %1, %0" : "=x"(products) : "x"(a), "x"(b));
            sum += products;
        }
        return sum;
    }

    static INLINE F rounded(F weights) { return KIND == BF16 ? to_bf16<W>(weights) : weights; }

    // weights (BLOCK, 4) -> (BLOCK / 2, 4) of two keys each, and by head what sums of integers are to be multiplied with
    static INLINE const Word* words(const float* weights, Word* out, float* scales) {
        I most{};
        for (int k = 0; k < BLOCK * HEADS; k += W) {
            const I size = ::load<I>(weights + k) & 0x7fffffff;
            most = size > most ? size : most;
        }
        most = by_head<W>(most, [](I a, I b) ALWAYS_INLINE { return a > b ? a : b; });
        const I usable = ((F)most > 0x1p-100f) & (most < 0x7f800000);
        const F inverse = usable ? TOP / (F)most : F{};
        float all[W];
        store(all, (F)most / TOP);
        std::copy(all, all + HEADS, scales);
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

    static INLINE Numbers values(const void* cache, int64_t at, int64_t next) {
        V low, high;
#pragma GCC unroll 32
        for (int i = 0; i < 2 * W; i++) {
            low[i] = i / 8 * 8 + i % 8 / 2 + (i % 2 ? 2 * W : 0);
            high[i] = low[i] + 4;
        }
        const V one = load(cache, at), other = load(cache, next);
        return {pick(one, other, low), pick(one, other, high)};
    }

    static INLINE Sum mix(Sum sum, V value, Word weights) { return multiply(sum, value, (V)(U{} + weights)); }

    static INLINE F total(Sum sum, float scale) {
        if constexpr (KIND == BF16) return sum;
        else return __builtin_convertvector(sum, F) * scale;
    }
};
#endif

// ---- attention ------------------------------------------------------------------------------------------------------
template <Kind KIND>
INLINE void fetch(const void* cache, int64_t at, int64_t count) {
    constexpr int64_t size = KIND == FP32 ? 4 : KIND == BF16 ? 2 : 1;
    const char* bytes = static_cast<const char*>(cache) + at * size;
    for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(bytes + i);
}

// Lane i: the sum of v[i]'s lanes. Each level adds neighbours of two vectors, one's into the lanes whose number has
// this level's bit clear, the other's where it is set.
template <int W, int BIT = 1, class V>
INLINE V sums_of(V (&v)[W]) {
    typename Lanes<W>::I clear, set;
    for (int i = 0; i < W; i++) clear[i] = (i & ~BIT) + (i & BIT ? W : 0), set[i] = clear[i] | BIT;
#pragma GCC unroll 8
    for (int i = 0; i < W / 2 / BIT; i++)
        v[i] = pick(v[2 * i], v[2 * i + 1], clear) + pick(v[2 * i], v[2 * i + 1], set);
    if constexpr (2 * BIT < W) return sums_of<W, 2 * BIT>(v);
    return v[0];
}

// Lane i: the number of its key, of those from k on; of keys past the last the last one's.
template <int W>
INLINE typename Lanes<W>::F by_key(const float* numbers, int64_t k, int64_t count) {
    constexpr int KEYS = W / HEADS;
    float last[KEYS];
    for (int i = 0; k + KEYS > count && i < KEYS; i++) last[i] = numbers[std::min(k + i, count - 1)];
    typename Lanes<W>::F few{};
    __builtin_memcpy(&few, k + KEYS > count ? last : numbers + k, sizeof last);
    typename Lanes<W>::I key;
    for (int i = 0; i < W; i++) key[i] = i / HEADS;
    return pick(few, few, key);
}

// scores (whole blocks of keys, 4) of 4 heads' queries with one key head's keys, times `by`, which has a lane for each
// head; -inf where a key is not seen
template <class Of>
INLINE void score(const Step& s, const typename Of::Number* q, typename Of::F by, const void* keys, int64_t at,
                  const uint8_t* sees, const float* scales, float* scores) {
    using F = typename Of::F;
    constexpr int W = Of::W, KEYS = W / HEADS;
    for (int64_t k = 0; k < (s.seen + BLOCK - 1) / BLOCK * BLOCK; k += KEYS) {
        int64_t rows[KEYS];
#pragma GCC unroll 4
        for (int i = 0; i < KEYS; i++) {
            rows[i] = at + std::min(k + i, s.seen - 1) * s.Hd;
            fetch<Of::KIND>(keys, rows[i] + AHEAD * s.Hd, s.Hd);
        }
        int32_t some = 0, all = 255;
#pragma GCC unroll 4
        for (int i = 0; i < KEYS; i++) some |= sees[k + i], all &= sees[k + i];
        typename Of::Sum sum[W] = {};
        for (int64_t d = 0; some && d < s.Hd; d += 2 * W) {
            decltype(Of::load(keys, d)) key[KEYS];
#pragma GCC unroll 4
            for (int i = 0; i < KEYS; i++) key[i] = Of::load(keys, rows[i] + d);
#pragma GCC unroll 4
            for (int h = 0; h < HEADS; h++) {
                const auto query = Of::load(q + h * s.Hd + d);
#pragma GCC unroll 4
                for (int i = 0; i < KEYS; i++)
                    sum[i * HEADS + h] = Of::multiply(sum[i * HEADS + h], query, key[i]);
            }
        }
        F found = __builtin_convertvector(sums_of<W>(sum), F) * by;
        if (Of::KIND == INT8) found *= by_key<W>(scales, k, s.seen);
        store(scores + k * HEADS, found);
        for (int i = 0; !all && i < KEYS * HEADS; i++)
            if (!sees[k + i / HEADS]) scores[k * HEADS + i] = -__builtin_inff();
    }
}

// Scores to weights, not yet divided by their sums, which it returns; of bytes, times the scales of the values.
template <class Of>
INLINE typename Of::F softmax(float* scores, int64_t seen, const float* scales) {
    constexpr int W = Of::W, KEYS = W / HEADS;
    using F = typename Of::F;
    const int64_t end = (seen + BLOCK - 1) / BLOCK * BLOCK;
    F most = load<F>(scores), sums{};
    for (int64_t k = KEYS; k < end; k += KEYS) {
        const F v = load<F>(scores + k * HEADS);
        most = v > most ? v : most;
    }
    most = by_head<W>(most, [](F a, F b) ALWAYS_INLINE { return a > b ? a : b; });
    for (int64_t k = 0; k < end; k += KEYS) {
        const F e = Of::rounded(exponential<W>(load<F>(scores + k * HEADS) - most));
        sums += e;
        store(scores + k * HEADS, e);
    }
    for (int64_t k = 0; Of::KIND == INT8 && k < seen; k += KEYS)
        store(scores + k * HEADS, load<F>(scores + k * HEADS) * by_key<W>(scales, k, seen));
    return by_head<W>(sums, [](F a, F b) ALWAYS_INLINE { return a + b; });
}

// out (4, Hd) += weights (seen, 4) @ values (seen, Hd): some keys at a time, and of those 2 P vectors at a time. `out`
// has them in the order of Of::place.
template <class Of, int P>
INLINE void mix(const Step& s, const float* weights, const void* values, int64_t at, float* out) {
    using F = typename Of::F;
    constexpr int W = Of::W;
    for (int64_t first = 0; first < s.seen; first += BLOCK) {
        const int64_t last = std::min(first + BLOCK, s.seen);
        typename Of::Word room[BLOCK * HEADS / 2];
        float scales[HEADS] = {};
        const auto* words = Of::words(weights + first * HEADS, room, scales);
        int64_t ahead = at + (first + AHEAD) * s.Hd;  // in order, though the values are not read in order
        for (int64_t d = 0; d < s.Hd; d += P * 2 * W) {
            typename Of::Sum sum[HEADS][P][2] = {};
            for (int64_t k = first; k < last; k += Of::TOGETHER) {
                const int64_t row = at + k * s.Hd + d, next = k + 1 < last ? row + s.Hd : row;
                fetch<Of::KIND>(values, ahead, Of::TOGETHER * P * 2 * W);
                ahead += Of::TOGETHER * P * 2 * W;
#pragma GCC unroll 4
                for (int i = 0; i < P; i++) {
                    const auto value = Of::values(values, row + i * 2 * W, next + i * 2 * W);
#pragma GCC unroll 8
                    for (int p = 0; p < 2 * HEADS; p++)
                        sum[p / 2][i][p % 2] = Of::mix(sum[p / 2][i][p % 2], value.part[p % 2],
                                                       words[(k - first) / Of::TOGETHER * HEADS + p / 2]);
                }
            }
#pragma GCC unroll 16
            for (int p = 0; p < HEADS * P * 2; p++) {
                const int h = p / (2 * P);
                float* to = out + h * s.Hd + d + p % (2 * P) * W;
                store(to, load<F>(to) + Of::total(sum[h][p / 2 % P][p % 2], scales[h]));
            }
        }
    }
}

// One key head of one sequence: its tokens one after the other, each into the cache and then over what is there. So a
// ring as long as the window is right: a token replaces the one that falls out of its own window.
template <class Of>
INLINE void attend(const Step& s, const Layer& layer, const Scratch& mine, int64_t b, int64_t head, int64_t thread) {
    constexpr int W = Of::W;
    constexpr Kind KIND = Of::KIND;
    const int64_t G = s.H / s.KvH, row = (s.H + 2 * s.KvH) * s.Hd, base = (b * s.KvH + head) * s.slots;
    const int64_t first = base * s.Hd;
    const float *key_scales = layer.key_scales + base, *value_scales = layer.value_scales + base;
    const float root = 1 / __builtin_sqrtf(static_cast<float>(s.Hd));
    float* scores = mine.scores + thread * HEADS * mine.stride;
    auto* queries = reinterpret_cast<typename Of::Number*>(mine.queries + thread * HEADS * s.Hd);
    float* mixed = mine.mixed + thread * HEADS * s.Hd;
    for (int64_t t = 0; t < s.T; t++) {
        const int64_t m = b * s.T + t, slot = base + (s.column + t) % s.slots;
        const float *cos = s.cos + m * s.Hd, *sin = s.sin + m * s.Hd;
        float* q = mine.qkv + m * row + head * G * s.Hd;
        float* k = mine.qkv + m * row + (s.H + head) * s.Hd;
        const float* v = k + s.KvH * s.Hd;
        for (int64_t g = 0; g < G; g++) rotate(q + g * s.Hd, cos, sin, s.Hd);
        rotate(k, cos, sin, s.Hd);
        keep<KIND>(layer.keys, layer.key_scales, slot, k, s.Hd);
        keep<KIND>(layer.values, layer.value_scales, slot, v, s.Hd);
        for (int64_t g = 0; g < G; g += HEADS) {
            const int64_t heads = std::min<int64_t>(HEADS, G - g);
            typename Of::F by;
            for (int64_t h = 0; h < HEADS; h++) {  // of fewer heads the last one again
                const float scale = Of::query(q + std::min(g + h, G - 1) * s.Hd, s.Hd, queries + h * s.Hd);
                for (int64_t i = h; i < W; i += HEADS) by[i] = root * scale;
            }
            score<Of>(s, queries, by, layer.keys, first, mine.sees + m * mine.stride, key_scales, scores);
            const auto sums = softmax<Of>(scores, s.seen, value_scales);
            std::fill(mixed, mixed + HEADS * s.Hd, 0.0f);
            if (W == 16 && s.Hd % (4 * W) == 0)  // as many sums as there are registers for
                mix<Of, 2>(s, scores, layer.values, first, mixed);
            else
                mix<Of, 1>(s, scores, layer.values, first, mixed);
            float* out = mine.attended + (m * s.H + head * G + g) * s.Hd;
            for (int64_t h = 0; h < heads; h++)
                for (int64_t i = 0; i < s.Hd; i++)
                    out[h * s.Hd + i] = mixed[h * s.Hd + i / (2 * W) * 2 * W + Of::place(i % (2 * W))] / sums[h];
        }
    }
}

// ---- the step -------------------------------------------------------------------------------------------------------
template <int W>
struct Thread {
    const Step& s;
    const Instance& does;
    const Scratch mine;
    const int64_t thread, threads, M;
    const bool pairs;  // whether there is an instruction for those of bf16

    INLINE void meet() const {
        if (threads > 1) GOMP_barrier();
    }

    // x (M, K) as integers, each thread a part of them
    INLINE void to_integers(const float* x, int64_t K, const Weight& w) const {
        Prepare job{x, FP32, w.zero ? 0 : 1 << (s.bits - 1), mine.chunks};
        const Range part(M * (K / CHUNK), thread, threads);
        does.prepare[s.bits == 8][s.planes == 2](&job, part.first, part.last);
    }

    INLINE void norm_to_integers(const float* weight, const Weight& w) const {
        const int64_t per_row = s.D / CHUNK;
        const Range part(M * per_row, thread, threads);
        for (int64_t m = part.first / per_row; m * per_row < part.last; m++) {
            const int64_t first = std::max(part.first - m * per_row, int64_t(0)) * CHUNK;
            const int64_t last = std::min(part.last - m * per_row, per_row) * CHUNK;
            normalise<W>(s.x + m * s.D, weight, s.eps, s.D, first, last, mine.h + m * s.D);
        }
        to_integers(mine.h, s.D, w);  // the same parts: no other thread's are read
    }

    // this thread's rows of y = chunks @ w^T, into columns of a matrix `stride` wide
    INLINE Range multiply(const Weight& w, float* y, int64_t stride) const {
        const Range part((w.N + ROWS - 1) / ROWS, thread, threads);
        Matmul job{w, mine.chunks, y, M, stride, FP32};
        does.matmul[s.bits == 8][s.planes == 2](&job, part.first, part.last);
        Range rows = part;
        rows.first *= ROWS;
        rows.last = std::min(rows.last * ROWS, w.N);
        return rows;
    }

    INLINE void multiply_and_add(const Weight& w, float* y) const {
        const Range rows = multiply(w, y, s.D);
        for (int64_t m = 0; m < M; m++)
            for (int64_t n = rows.first; n < rows.last; n++) s.x[m * s.D + n] += y[m * s.D + n];
    }

    INLINE void swiglu(Range columns) const {
        using F = typename Lanes<W>::F;
        for (int64_t m = 0; m < M; m++)
            for (int64_t i = columns.first; i < columns.last; i += ROWS)  // all widths are multiples of 32
                for (int p = 0; p < ROWS; p += W) {
                    float* gate = mine.gate + m * s.inner + i + p;
                    const F g = load<F>(gate), limited = g < -80.0f ? F{} - 80.0f : g;
                    store(gate, g / (1 + exponential<W>(-limited)) * load<F>(mine.up + m * s.inner + i + p));
                }
    }

    // What each token sees, the same in all blocks: those before it in its sequence have replaced what was in their
    // slots, those after it have not yet.
    INLINE void look() const {
        const Range part(M, thread, threads);
        for (int64_t m = part.first; m < part.last; m++) {
            const int64_t b = m / s.T, now = s.new_positions[m];
            uint8_t* sees = mine.sees + m * mine.stride;
            auto see = [&](int64_t slot, int64_t p) {
                const bool seen = now < 0 || (p >= 0 && p <= now && (s.window == 0 || p > now - s.window));
                sees[slot] = seen ? 255 : 0;
            };
            for (int64_t slot = 0; slot < s.seen; slot++) see(slot, s.positions[b * s.slots + slot]);
            for (int64_t i = b * s.T; i <= m; i++) see((s.column + i - b * s.T) % s.slots, s.new_positions[i]);
            std::fill(sees + s.seen, sees + mine.stride, uint8_t(0));
        }
    }

    template <class Of>
    INLINE void attention(const Layer& layer) const {
        const Range part(s.B * s.KvH, thread, threads);
        for (int64_t i = part.first; i < part.last; i++)
            attend<Of>(s, layer, mine, i / s.KvH, i % s.KvH, thread);
    }

    INLINE void attention(const Layer& layer) const {
        if (s.cache_kind == FP32) return attention<Floats<W, FP32>>(layer);
#ifdef X86
        if constexpr (W > 4)
            if (s.cache_kind == INT8) return attention<Pairs<W, INT8>>(layer);
#endif
#ifdef X86_BF16
        if constexpr (W == 16)
            if (s.cache_kind == BF16 && pairs) return attention<Pairs<W, BF16>>(layer);
#endif
        if constexpr (W == 4)
            if (s.cache_kind == INT8) return attention<Floats<W, INT8>>(layer);
        attention<Floats<W, BF16>>(layer);
    }

    INLINE void block(const Layer& layer) const {
        const int64_t Q = s.H * s.Hd, KV = s.KvH * s.Hd, row = Q + 2 * KV;
        norm_to_integers(layer.norm1, layer.q);
        meet();
        multiply(layer.q, mine.qkv, row);
        multiply(layer.k, mine.qkv + Q, row);
        multiply(layer.v, mine.qkv + Q + KV, row);
        meet();
        attention(layer);
        meet();
        to_integers(mine.attended, Q, layer.o);
        meet();
        multiply_and_add(layer.o, mine.h);
        meet();
        norm_to_integers(layer.norm2, layer.gate);
        meet();
        multiply(layer.gate, mine.gate, s.inner);
        swiglu(multiply(layer.up, mine.up, s.inner));
        meet();
        to_integers(mine.gate, s.inner, layer.down);
        meet();
        multiply_and_add(layer.down, mine.h);
        meet();
    }

    INLINE void run() const {
        look();
        for (int64_t i = 0; i < s.count; i++) block(s.layers[i]);
        const Range rows(M, thread, threads);
        for (int64_t m = rows.first; m < rows.last; m++)
            normalise<W>(s.x + m * s.D, s.norm, s.eps, s.D, 0, s.D, s.x + m * s.D);
    }
};

// Which thread this is, the region says: it may have fewer than were asked for.
template <int W>
INLINE void one_thread(const Step& s, int isa) {
    const int threads = omp_get_num_threads ? omp_get_num_threads() : 1;
    const int thread = omp_get_thread_num ? omp_get_thread_num() : 0;
    Thread<W>{s, instance(isa), Scratch(s, threads), thread, threads, s.B * s.T, isa == AVX512_BF16}.run();
}

void step_portable(void* s, int64_t, int64_t) { one_thread<4>(*static_cast<Step*>(s), PORTABLE); }
#ifdef X86
TARGET_AVX2 void step_avx2(void* s, int64_t, int64_t) { one_thread<8>(*static_cast<Step*>(s), AVX2); }
TARGET_AVX512 void step_avx512(void* s, int64_t, int64_t) { one_thread<16>(*static_cast<Step*>(s), AVX512); }
TARGET_AVX512 void step_bf16(void* s, int64_t, int64_t) { one_thread<16>(*static_cast<Step*>(s), AVX512_BF16); }
#endif

}  // namespace

extern "C" {

int64_t step_scratch(const Step* s, int threads) { return Scratch(*s, threads).bytes; }

void step(Step* s, int isa, int threads) {
    Work work = step_portable;
    (void)isa;
#ifdef X86
    if (isa == AVX2) work = step_avx2;
    if (isa == AVX512) work = step_avx512;
    if (isa == AVX512_BF16) work = step_bf16;
#endif
    parallel(work, s, threads, GOMP_barrier ? threads : 1);
}

}  // extern "C"
