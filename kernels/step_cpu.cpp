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

// ---- scratch: everything that a step writes, in one piece of memory that is there already ---------------------------
struct Scratch {
    float *h, *qkv, *attended, *gate, *up;  // (M, D), (M, (H + 2 KvH) Hd), (M, H Hd), (M, inner) twice
    uint8_t* chunks;
    float* scores;                          // of each thread (H / KvH, stride)
    int64_t* positions;                     // of each thread (slots)
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
        scores = reinterpret_cast<float*>(take(4 * threads * (s.H / s.KvH) * stride));
        positions = reinterpret_cast<int64_t*>(take(8 * threads * s.slots));
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
constexpr int HEADS = 4;  // of those that share a key head, handled together: each key and value is read once for them

constexpr int AHEAD = 16;  // keys or values that are asked for before they are used

template <Kind KIND>
INLINE void fetch(const void* cache, int64_t at, int64_t count) {
    constexpr int64_t size = KIND == FP32 ? 4 : KIND == BF16 ? 2 : 1;
    for (int64_t i = 0; i < count * size; i += 64) __builtin_prefetch(static_cast<const char*>(cache) + at * size + i);
}

// The sums of four vectors' lanes: pairs of lanes, then pairs of those, then the quarters of the vector.
template <int W>
INLINE void sums_of_4(const typename Lanes<W>::F (&v)[HEADS], float* sums) {
    using F = typename Lanes<W>::F;
    using I = typename Lanes<W>::I;
    I even, odd, low, high;
    for (int i = 0; i < W; i++) {
        even[i] = i / 2 * 2 + i % 2 * W, odd[i] = even[i] + 1;
        low[i] = i / 4 * 4 + i % 2 + i / 2 % 2 * W, high[i] = low[i] + 2;
    }
    const F a = pick(v[0], v[1], even) + pick(v[0], v[1], odd);
    const F b = pick(v[2], v[3], even) + pick(v[2], v[3], odd);
    float quarters[W];
    store(quarters, pick(a, b, low) + pick(a, b, high));
    for (int h = 0; h < HEADS; h++) sums[h] = quarters[h];
    for (int i = 4; i < W; i += 4)
        for (int h = 0; h < HEADS; h++) sums[h] += quarters[i + h];
}

// scores (G, seen) of G heads' queries with one key head's keys, -inf where a key is not seen
template <int W, Kind KIND>
INLINE void score(const Step& s, const float* q, const void* keys, int64_t at, const int64_t* positions, int64_t now,
                  const float* scales, float* scores, int64_t stride) {
    using F = typename Lanes<W>::F;
    const int64_t G = s.H / s.KvH;
    const float root = 1 / __builtin_sqrtf(static_cast<float>(s.Hd));
    for (int64_t g = 0; g < G; g += HEADS) {
        const float* heads[HEADS];
        for (int h = 0; h < HEADS; h++) heads[h] = q + std::min(g + h, G - 1) * s.Hd;
        const int64_t count = std::min<int64_t>(HEADS, G - g);
        for (int64_t k = 0; k < s.seen; k++) {
            const int64_t p = positions[k], key = at + k * s.Hd;
            fetch<KIND>(keys, key + AHEAD * s.Hd, s.Hd);
            float sums[HEADS] = {-__builtin_inff(), -__builtin_inff(), -__builtin_inff(), -__builtin_inff()};
            if (now < 0 || (p >= 0 && p <= now && (s.window == 0 || p > now - s.window))) {
                F sum[HEADS] = {};
                for (int64_t d = 0; d < s.Hd; d += W) {
                    const F values = load_floats<W>(keys, KIND, key + d);
#pragma GCC unroll 4
                    for (int h = 0; h < HEADS; h++) sum[h] += load<F>(heads[h] + d) * values;
                }
                sums_of_4<W>(sum, sums);
                for (int h = 0; h < HEADS; h++) sums[h] *= KIND == INT8 ? root * scales[k] : root;
            }
            for (int64_t h = 0; h < count; h++) scores[(g + h) * stride + k] = sums[h];
        }
    }
}

// scores to weights, and those to weights of the bytes that the values are kept as
template <int W, Kind KIND>
INLINE void softmax(float* scores, int64_t count, const float* scales) {
    using F = typename Lanes<W>::F;
    const int64_t whole = (count + W - 1) / W * W;
    for (int64_t k = count; k < whole; k++) scores[k] = -__builtin_inff();
    F most = load<F>(scores), sums{};
    for (int64_t k = W; k < whole; k += W) {
        const F v = load<F>(scores + k);
        most = v > most ? v : most;
    }
    float largest = most[0];
    for (int i = 1; i < W; i++) largest = std::max(largest, most[i]);
    for (int64_t k = 0; k < whole; k += W) {
        const F e = exponential<W>(load<F>(scores + k) - largest);
        sums += e;
        store(scores + k, e);
    }
    const float whole_sum = horizontal<W>(sums);
    for (int64_t k = 0; k < whole; k += W) store(scores + k, load<F>(scores + k) / whole_sum);
    for (int64_t k = 0; KIND == INT8 && k < count; k++) scores[k] *= scales[k];
}

// out (G, Hd) = weights (G, seen) @ values (seen, Hd), for 4 vectors of Hd and 4 heads at a time
template <int W, Kind KIND>
INLINE void mix(const Step& s, const float* weights, int64_t stride, const void* values, int64_t at, float* out) {
    using F = typename Lanes<W>::F;
    constexpr int V = W == 16 ? 4 : 2;
    const int64_t G = s.H / s.KvH;
    for (int64_t g = 0; g < G; g += HEADS) {
        const int64_t heads = std::min<int64_t>(HEADS, G - g);
        for (int64_t d = 0; d < s.Hd; d += V * W) {
            const int64_t width = std::min<int64_t>(V, (s.Hd - d) / W);
            F sum[HEADS][V] = {};
            if (heads == HEADS && width == V) {
                for (int64_t k = 0; k < s.seen; k++) {
                    fetch<KIND>(values, at + (k + AHEAD) * s.Hd + d, V * W);
#pragma GCC unroll 4
                    for (int i = 0; i < V; i++) {
                        const F value = load_floats<W>(values, KIND, at + k * s.Hd + d + i * W);
#pragma GCC unroll 4
                        for (int h = 0; h < HEADS; h++) sum[h][i] += value * weights[(g + h) * stride + k];
                    }
                }
            } else {
                for (int64_t k = 0; k < s.seen; k++)
                    for (int64_t i = 0; i < width; i++)
                        for (int64_t h = 0; h < heads; h++)
                            sum[h][i] += load_floats<W>(values, KIND, at + k * s.Hd + d + i * W) *
                                         weights[(g + h) * stride + k];
            }
            for (int64_t h = 0; h < heads; h++)
                for (int64_t i = 0; i < width; i++) store(out + (g + h) * s.Hd + d + i * W, sum[h][i]);
        }
    }
}

// One key head of one sequence: its tokens one after the other, each into the cache and then over what is there. So a
// ring as long as the window is right: a token replaces the one that falls out of its own window.
template <int W, Kind KIND>
INLINE void attend(const Step& s, const Layer& layer, const Scratch& mine, int64_t b, int64_t head, float* scores,
                   int64_t* positions) {
    const int64_t G = s.H / s.KvH, row = (s.H + 2 * s.KvH) * s.Hd, base = (b * s.KvH + head) * s.slots;
    const float *key_scales = layer.key_scales + base, *value_scales = layer.value_scales + base;
    std::copy(s.positions + b * s.slots, s.positions + b * s.slots + s.seen, positions);
    for (int64_t t = 0; t < s.T; t++) {
        const int64_t m = b * s.T + t, slot = (s.column + t) % s.slots;
        float* q = mine.qkv + m * row + head * G * s.Hd;
        float* k = mine.qkv + m * row + (s.H + head) * s.Hd;
        const float* v = k + s.KvH * s.Hd;
        for (int64_t g = 0; g < G; g++) rotate(q + g * s.Hd, s.cos + m * s.Hd, s.sin + m * s.Hd, s.Hd);
        rotate(k, s.cos + m * s.Hd, s.sin + m * s.Hd, s.Hd);
        keep<KIND>(layer.keys, layer.key_scales, base + slot, k, s.Hd);
        keep<KIND>(layer.values, layer.value_scales, base + slot, v, s.Hd);
        positions[slot] = s.new_positions[m];
        const int64_t first = base * s.Hd;
        score<W, KIND>(s, q, layer.keys, first, positions, s.new_positions[m], key_scales, scores, mine.stride);
        for (int64_t g = 0; g < G; g++) softmax<W, KIND>(scores + g * mine.stride, s.seen, value_scales);
        mix<W, KIND>(s, scores, mine.stride, layer.values, first, mine.attended + (m * s.H + head * G) * s.Hd);
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

    INLINE void attention(const Layer& layer) const {
        const Range part(s.B * s.KvH, thread, threads);
        float* scores = mine.scores + thread * (s.H / s.KvH) * mine.stride;
        int64_t* positions = mine.positions + thread * s.slots;
        for (int64_t i = part.first; i < part.last; i++)
            if (s.cache_kind == FP32)
                attend<W, FP32>(s, layer, mine, i / s.KvH, i % s.KvH, scores, positions);
            else if (s.cache_kind == INT8)
                attend<W, INT8>(s, layer, mine, i / s.KvH, i % s.KvH, scores, positions);
            else
                attend<W, BF16>(s, layer, mine, i / s.KvH, i % s.KvH, scores, positions);
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
