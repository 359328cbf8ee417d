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

constexpr int HEADS = 4;  // of those that share a key head, handled together: each key and value is read once for them

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
        stride = (s.slots + ROWS - 1) / ROWS * ROWS;
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

// ---- attention ------------------------------------------------------------------------------------------------------
// The scores of 4 heads lie side by side: (keys, 4), W / 4 keys to a vector.
constexpr int AHEAD = 8;   // keys or values that are asked for before they are used
constexpr int BLOCK = 16;  // values that are used in turn for all of Hd, from the nearest cache

template <Kind KIND>
INLINE void fetch(const void* cache, int64_t at, int64_t count) {
    constexpr int64_t size = KIND == FP32 ? 4 : KIND == BF16 ? 2 : 1;
    const char* bytes = static_cast<const char*>(cache) + at * size;
    for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(bytes + i, 0, 1);
}

// Lane i: the sum of v[i]'s lanes. Each level adds neighbours of two vectors, one's into the lanes whose number has
// this level's bit clear, the other's where it is set.
template <int W, int BIT = 1>
INLINE typename Lanes<W>::F sums_of(typename Lanes<W>::F (&v)[W]) {
    typename Lanes<W>::I clear, set;
    for (int i = 0; i < W; i++) clear[i] = (i & ~BIT) + (i & BIT ? W : 0), set[i] = clear[i] | BIT;
#pragma GCC unroll 8
    for (int i = 0; i < W / 2 / BIT; i++)
        v[i] = pick(v[2 * i], v[2 * i + 1], clear) + pick(v[2 * i], v[2 * i + 1], set);
    if constexpr (2 * BIT < W) return sums_of<W, 2 * BIT>(v);
    return v[0];
}

// Of each head, what `of` makes of the lanes that are its own.
template <int W, class Of>
INLINE typename Lanes<W>::F by_head(typename Lanes<W>::F v, Of of) {
    typename Lanes<W>::F all;
    for (int h = 0; h < HEADS; h++) {
        float found = v[h];
        for (int i = h + HEADS; i < W; i += HEADS) found = of(found, v[i]);
        for (int i = h; i < W; i += HEADS) all[i] = found;
    }
    return all;
}

// 2 W numbers of a cache, in the order in which they come out fastest: of bf16 the even ones first, then the odd ones.
template <int W, Kind KIND>
INLINE void load_two(const void* cache, int64_t at, typename Lanes<W>::F (&two)[2]) {
    using F = typename Lanes<W>::F;
    using U = typename Lanes<W>::U;
    if (KIND == BF16) {
        const U words = load<U>(static_cast<const uint16_t*>(cache) + at);
        two[0] = (F)(words << 16), two[1] = (F)(words & 0xffff0000);
    } else {
        for (int i = 0; i < 2; i++) two[i] = load_floats<W>(cache, KIND, at + i * W);
    }
}

// (Hd) into that order, or out of it
template <int W, Kind KIND>
INLINE void arrange(float* x, int64_t Hd, bool back) {
    for (int64_t d = 0; KIND == BF16 && d < Hd; d += 2 * W) {
        float two[2 * W];
        for (int i = 0; i < 2 * W; i++) {
            const int other = i % 2 * W + i / 2;
            two[back ? i : other] = x[d + (back ? other : i)];
        }
        std::copy(two, two + 2 * W, x + d);
    }
}

// Lane i: the number of its key.
template <int W>
INLINE typename Lanes<W>::F by_key(const float* numbers) {
    typename Lanes<W>::F all;
    for (int i = 0; i < W; i++) all[i] = numbers[i / HEADS];
    return all;
}

// scores (seen, 4) of 4 heads' queries with one key head's keys, -inf where a key is not seen
template <int W, Kind KIND>
INLINE void score(const Step& s, const float* q, const void* keys, int64_t at, const uint8_t* sees,
                  const float* scales, float* scores) {
    using F = typename Lanes<W>::F;
    constexpr int KEYS = W / HEADS;
    const float root = 1 / __builtin_sqrtf(static_cast<float>(s.Hd));
    for (int64_t k = 0; k < s.seen; k += KEYS) {
        int64_t rows[KEYS];
        float of_bytes[KEYS];
#pragma GCC unroll 4
        for (int i = 0; i < KEYS; i++) {
            const int64_t key = std::min(k + i, s.seen - 1);
            rows[i] = at + key * s.Hd;
            if (KIND == INT8) of_bytes[i] = scales[key];
            fetch<KIND>(keys, rows[i] + AHEAD * s.Hd, s.Hd);
        }
        int32_t some = 0, all = 255;
#pragma GCC unroll 4
        for (int i = 0; i < KEYS; i++) some |= sees[k + i], all &= sees[k + i];
        F sum[W] = {};
        for (int64_t d = 0; some && d < s.Hd; d += 2 * W) {
            F key[KEYS][2];
#pragma GCC unroll 4
            for (int i = 0; i < KEYS; i++) load_two<W, KIND>(keys, rows[i] + d, key[i]);
#pragma GCC unroll 8
            for (int p = 0; p < 2 * HEADS; p++) {
                const F query = load<F>(q + p / 2 * s.Hd + d + p % 2 * W);
#pragma GCC unroll 4
                for (int i = 0; i < KEYS; i++) sum[i * HEADS + p / 2] += query * key[i][p % 2];
            }
        }
        F found = sums_of<W>(sum) * root;
        if (KIND == INT8) found *= by_key<W>(of_bytes);
        store(scores + k * HEADS, found);
        for (int i = 0; !all && i < KEYS * HEADS; i++)
            if (!sees[k + i / HEADS]) scores[k * HEADS + i] = -__builtin_inff();
    }
}

// Scores to weights, not yet divided by their sums, which it returns; of bytes, times the scales of the values.
template <int W, Kind KIND>
INLINE typename Lanes<W>::F softmax(float* scores, int64_t seen, const float* scales) {
    using F = typename Lanes<W>::F;
    constexpr int KEYS = W / HEADS;
    F most = load<F>(scores), sums{};
    for (int64_t k = KEYS; k < seen; k += KEYS) {
        const F v = load<F>(scores + k * HEADS);
        most = v > most ? v : most;
    }
    most = by_head<W>(most, [](float a, float b) { return std::max(a, b); });
    for (int64_t k = 0; k < seen; k += KEYS) {
        const F e = exponential<W>(load<F>(scores + k * HEADS) - most);
        sums += e;
        store(scores + k * HEADS, e);
    }
    for (int64_t k = 0; KIND == INT8 && k < seen; k += KEYS) {
        float of_bytes[KEYS];
        for (int i = 0; i < KEYS; i++) of_bytes[i] = scales[std::min(k + i, seen - 1)];
        store(scores + k * HEADS, load<F>(scores + k * HEADS) * by_key<W>(of_bytes));
    }
    return by_head<W>(sums, [](float a, float b) { return a + b; });
}

// out (4, Hd) += weights (seen, 4) @ values (seen, Hd): some keys at a time, and of those 2 P vectors at a time
template <int W, Kind KIND, int P>
INLINE void mix(const Step& s, const float* weights, const void* values, int64_t at, float* out) {
    using F = typename Lanes<W>::F;
    for (int64_t first = 0; first < s.seen; first += BLOCK) {
        const int64_t last = std::min(first + BLOCK, s.seen);
        for (int64_t d = 0; d < s.Hd; d += P * 2 * W) {
            F sum[HEADS][P][2] = {};
            for (int64_t k = first; k < last; k++) {
                if (d == 0) fetch<KIND>(values, at + (k + AHEAD) * s.Hd, s.Hd);
#pragma GCC unroll 4
                for (int i = 0; i < P; i++) {
                    F value[2];
                    load_two<W, KIND>(values, at + k * s.Hd + d + i * 2 * W, value);
#pragma GCC unroll 8
                    for (int p = 0; p < 2 * HEADS; p++) sum[p / 2][i][p % 2] += value[p % 2] * weights[k * HEADS + p / 2];
                }
            }
#pragma GCC unroll 16
            for (int p = 0; p < HEADS * P * 2; p++) {
                float* to = out + p / (2 * P) * s.Hd + d + p % (2 * P) * W;
                store(to, load<F>(to) + sum[p / (2 * P)][p / 2 % P][p % 2]);
            }
        }
    }
}

// One key head of one sequence: its tokens one after the other, each into the cache and then over what is there. So a
// ring as long as the window is right: a token replaces the one that falls out of its own window.
template <int W, Kind KIND>
INLINE void attend(const Step& s, const Layer& layer, const Scratch& mine, int64_t b, int64_t head, int64_t thread) {
    const int64_t G = s.H / s.KvH, row = (s.H + 2 * s.KvH) * s.Hd, base = (b * s.KvH + head) * s.slots;
    const int64_t first = base * s.Hd;
    const float *key_scales = layer.key_scales + base, *value_scales = layer.value_scales + base;
    float* scores = mine.scores + thread * HEADS * mine.stride;
    float *queries = mine.queries + thread * HEADS * s.Hd, *mixed = mine.mixed + thread * HEADS * s.Hd;
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
            for (int64_t h = 0; h < HEADS; h++) {  // of fewer heads the last one again
                const float* one = q + std::min(g + h, G - 1) * s.Hd;
                arrange<W, KIND>(std::copy(one, one + s.Hd, queries + h * s.Hd) - s.Hd, s.Hd, false);
            }
            score<W, KIND>(s, queries, layer.keys, first, mine.sees + m * mine.stride, key_scales, scores);
            const auto sums = softmax<W, KIND>(scores, s.seen, value_scales);
            std::fill(mixed, mixed + HEADS * s.Hd, 0.0f);
            if (W == 16 && s.Hd % (4 * W) == 0)  // as many sums as there are registers for
                mix<W, KIND, 2>(s, scores, layer.values, first, mixed);
            else
                mix<W, KIND, 1>(s, scores, layer.values, first, mixed);
            float* out = mine.attended + (m * s.H + head * G + g) * s.Hd;
            for (int64_t h = 0; h < heads; h++) {
                arrange<W, KIND>(mixed + h * s.Hd, s.Hd, true);
                for (int64_t i = 0; i < s.Hd; i++) out[h * s.Hd + i] = mixed[h * s.Hd + i] / sums[h];
            }
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

    INLINE void attention(const Layer& layer) const {
        const Range part(s.B * s.KvH, thread, threads);
        for (int64_t i = part.first; i < part.last; i++)
            if (s.cache_kind == FP32)
                attend<W, FP32>(s, layer, mine, i / s.KvH, i % s.KvH, thread);
            else if (s.cache_kind == INT8)
                attend<W, INT8>(s, layer, mine, i / s.KvH, i % s.KvH, thread);
            else
                attend<W, BF16>(s, layer, mine, i / s.KvH, i % s.KvH, thread);
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
    Thread<W>{s, instance(isa), Scratch(s, threads), thread, threads, s.B * s.T}.run();
}

void step_portable(void* s, int64_t, int64_t) { one_thread<4>(*static_cast<Step*>(s), PORTABLE); }
#if defined(__x86_64__) && !defined(PORTABLE_ONLY)
TARGET_AVX2 void step_avx2(void* s, int64_t, int64_t) { one_thread<8>(*static_cast<Step*>(s), AVX2); }
TARGET_AVX512 void step_avx512(void* s, int64_t, int64_t) { one_thread<16>(*static_cast<Step*>(s), AVX512); }
#endif

}  // namespace

extern "C" {

int64_t step_scratch(const Step* s, int threads) { return Scratch(*s, threads).bytes; }

void step(Step* s, int isa, int threads) {
    Work work = step_portable;
    (void)isa;
#if defined(__x86_64__) && !defined(PORTABLE_ONLY)
    if (isa == AVX2) work = step_avx2;
    if (isa == AVX512) work = step_avx512;
#endif
    parallel(work, s, threads, GOMP_barrier ? threads : 1);
}

}  // extern "C"
