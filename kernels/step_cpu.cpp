// All blocks of the model for a few tokens on the CPU, in one call: norms, INT4 matmuls, RoPE, attention over the
// rolling cache, SwiGLU. It computes what minichat/model.py does; a reader may skip it, and so may a device.
//
// A token of a 7B is 32 blocks of 7 matmuls. From Python each of them, and every norm and rotation between, costs more
// than its arithmetic, and threads that wait for one Python thread wait longer still. Here they stay together from the
// embeddings to the last norm, share out matmuls and heads, and meet at a barrier between one sum over all columns
// and the next:
//
//   norm, to integers | q k v | RoPE, into the cache, attention, to integers | o, + x |
//   norm, to integers | gate up, SwiGLU, to integers                         | down, + x |
//
// Each output is computed whole by one thread in an order that depends on neither which one nor the batch, so that
// a token has the same logits alone and among others: a draft checked in one batch is what greedy decoding would say.
#include <atomic>
#include <utility>

#include "attention_cpu.h"

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

enum Queue { Q, K, V, ATTENTION, O, GATE_UP, DOWN, QUEUES };  // of work that threads share out, in order

constexpr int64_t TAKE_BYTES = 1 << 16;  // of a weight, by a thread at a time; a block of rows may have more

struct alignas(64) Taken {
    std::atomic<int64_t> count;     // of a thread's part of a queue, by itself or by others
};

// ---- scratch: everything that a step writes, in one piece of memory that is there already ---------------------------
struct Scratch {
    float *h, *qkv, *attended, *gate, *up;  // (M, D), (M, (H + 2 KvH) Hd), (M, H Hd), (M, inner) twice
    uint8_t *chunks, *inner_chunks;         // as integers: what all matmuls but `down` read, and what that reads
    float *scores, *queries, *mixed;        // of each thread (stride, HEADS), (HEADS, Hd) twice
    Taken* taken;                           // (QUEUES, threads)
    uint8_t* sees;                          // (M, stride): 255 for the keys that a token sees, else 0
    int64_t stride, bytes;

    Scratch(const Step& s, int threads) {
        const int64_t M = s.B * s.T;
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
        chunks = take(M * std::max(s.D, s.H * s.Hd) / CHUNK * static_cast<int64_t>(sizeof(Chunk<2>)));
        inner_chunks = take(M * s.inner / CHUNK * static_cast<int64_t>(sizeof(Chunk<2>)));
        stride = (s.slots + BLOCK - 1) / BLOCK * BLOCK;
        scores = reinterpret_cast<float*>(take(4 * threads * HEADS * stride));
        queries = reinterpret_cast<float*>(take(4 * threads * HEADS * s.Hd));
        mixed = reinterpret_cast<float*>(take(4 * threads * HEADS * s.Hd));
        taken = reinterpret_cast<Taken*>(take(QUEUES * threads * static_cast<int64_t>(sizeof(Taken))));
        sees = take(M * stride);
    }
};

struct Range {
    int64_t first, last;

    Range(int64_t first, int64_t last) : first(first), last(last) {}
    Range(int64_t count, int64_t thread, int64_t threads)
        : Range(count * thread / threads, count * (thread + 1) / threads) {}
};

// ---- small arithmetic -----------------------------------------------------------------------------------------------
// out (last - first) of a row of D: x / rms(x) * weight
template <int W>
INLINE void normalise(const float* x, const float* weight, double eps, int64_t D, int64_t first, int64_t last,
                      float* out) {
    using F = typename Lanes<W>::F;
    F squares[32 / W] = {};  // several, or each addition waits for the one before
    for (int64_t d = 0; d < D; d += 32)
        each<32 / W>([&](int i) ALWAYS_INLINE {
            const F v = load<F>(x + d + i * W);
            squares[i] += v * v;
        });
    F all{};
    each<32 / W>([&](int i) ALWAYS_INLINE { all += squares[i]; });
    const float sum = folded<W>(all, [](F a, F b) ALWAYS_INLINE { return a + b; })[0];
    const float scale = 1 / __builtin_sqrtf(sum / static_cast<float>(D) + static_cast<float>(eps));
    for (int64_t d = first; d < last; d += W) store(out + d, load<F>(x + d) * scale * load<F>(weight + d));
}

template <int W>
INLINE void rotate(float* x, const float* cos, const float* sin, int64_t Hd) {
    using F = typename Lanes<W>::F;
    for (int64_t i = 0, j = Hd / 2; j < Hd; i += W, j += W) {
        const F a = load<F>(x + i), b = load<F>(x + j);
        store(x + i, a * load<F>(cos + i) - b * load<F>(sin + i));
        store(x + j, b * load<F>(cos + j) + a * load<F>(sin + j));
    }
}

// A key or value of one token and head into its slot; a scale of bytes is their largest magnitude / 127, or NaN or
// infinity if there is one among them, and the bytes are 0 then.
template <int W, Kind KIND>
INLINE void keep(void* cache, float* scales, int64_t slot, const float* values, int64_t Hd) {
    using F = typename Lanes<W>::F;
    using U = typename Lanes<W>::U;
    const float most = KIND == INT8 ? largest<W>(values, Hd) : 0, inverse = inverse_of(127, most);
    if (KIND == INT8) scales[slot] = most / 127;
    for (int64_t i = 0, at = slot * Hd; i < Hd; i += W, at += W) {
        const F v = load<F>(values + i);
        if (KIND == FP32) {
            store(static_cast<float*>(cache) + at, v);
        } else if (KIND == BF16) {
            const U nan = (U)v | 0x400000, bits = (U)(v == v ? to_bf16<W>(v) : (F)nan);
            store(static_cast<uint16_t*>(cache) + at, __builtin_convertvector(bits >> 16, typename Lanes<W>::H));
        } else {
            const auto whole = inverse > 0 ? nearest<W>(v * inverse) : typename Lanes<W>::I{};
            store(static_cast<int8_t*>(cache) + at, __builtin_convertvector(whole, typename Lanes<W>::S));
        }
    }
}

// ---- attention ------------------------------------------------------------------------------------------------------
// One key head of one sequence: its tokens one after the other, each into the cache and then over what is there. So a
// ring as long as the window is right: a token replaces the one that falls out of its own window.
template <class Of>
INLINE void attend(const Step& s, const Layer& layer, const Scratch& mine, int64_t b, int64_t head, int64_t thread) {
    constexpr int W = Of::W, COLUMNS = Of::PARTS * W;
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
        for (int64_t g = 0; g < G; g++) rotate<W>(q + g * s.Hd, cos, sin, s.Hd);
        rotate<W>(k, cos, sin, s.Hd);
        keep<W, KIND>(layer.keys, layer.key_scales, slot, k, s.Hd);
        keep<W, KIND>(layer.values, layer.value_scales, slot, v, s.Hd);
        for (int64_t g = 0; g < G; g += HEADS) {
            const int64_t heads = std::min<int64_t>(HEADS, G - g);
            typename Of::F by;
            for (int64_t h = 0; h < HEADS; h++) {  // of fewer heads the last one again
                const float scale = Of::query(q + std::min(g + h, G - 1) * s.Hd, s.Hd, h, queries);
                for (int64_t i = h; i < W; i += HEADS) by[i] = root * scale;
            }
            const auto most = score<Of>(queries, by, layer.keys, first, s.seen, s.Hd, mine.sees + m * mine.stride,
                                        key_scales, scores);
            typename Of::F sums;
            constexpr int P = W == 16 && Of::PARTS == 2 ? 2 : 1;  // as many sums as there are registers for
            if (P == 1 || s.Hd % (P * COLUMNS) == 0)
                sums = mix<Of, P>(scores, most, layer.values, first, s.seen, s.Hd, value_scales, mixed);
            else
                sums = mix<Of, 1>(scores, most, layer.values, first, s.seen, s.Hd, value_scales, mixed);
            float* out = mine.attended + (m * s.H + head * G + g) * s.Hd;
            for (int64_t h = 0; h < heads; h++) {
                const float scale = 1 / sums[h];
                for (int64_t i = h * s.Hd; i < (h + 1) * s.Hd; i += COLUMNS)
                    each<COLUMNS>([&](int c) ALWAYS_INLINE { out[i + c] = mixed[i + Of::place(c)] * scale; });
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
    const bool pairs;  // whether there is an instruction for those of bf16

    INLINE void meet() const {
        if (threads > 1) GOMP_barrier();
    }

    // some chunks of x (M, w.K) as integers
    INLINE void to_integers(const float* x, const Weight& w, uint8_t* chunks, Range some) const {
        Prepare job{M, w.K, x, FP32, w.zero ? 0 : 1 << (s.bits - 1), chunks};
        does.prepare[s.bits == 8][s.planes == 2](&job, some.first, some.last);
    }

    INLINE void norm_to_integers(const float* weight, const Weight& w) const {
        const int64_t per_row = s.D / CHUNK;
        const Range part(M * per_row, thread, threads);
        for (int64_t m = part.first / per_row; m * per_row < part.last; m++) {
            const int64_t first = std::max(part.first - m * per_row, int64_t(0)) * CHUNK;
            const int64_t last = std::min(part.last - m * per_row, per_row) * CHUNK;
            normalise<W>(s.x + m * s.D, weight, s.eps, s.D, first, last, mine.h + m * s.D);
        }
        to_integers(mine.h, w, mine.chunks, part);
    }

    // take(range) for all items of a queue, `some` at a time: those of this thread's part in order, then what others
    // have not begun of theirs. A core that someone else uses too, as on a shared machine, may be half as fast as the
    // next. The queue half way round is made ready for its next turn: barriers lie between the two, before and after.
    template <class Take>
    INLINE void share_out(Queue queue, int64_t count, int64_t some, Take take) const {
        mine.taken[(queue + QUEUES / 2) % QUEUES * threads + thread].count = 0;
        for (int64_t i = thread; i < thread + threads; i++) {
            const Range part(count, i % threads, threads);
            std::atomic<int64_t>& taken = mine.taken[queue * threads + i % threads].count;
            Range here = part;
            while ((here.first = part.first + taken.fetch_add(some)) < part.last) {
                here.last = std::min(here.first + some, part.last);
                take(here);
            }
        }
    }

    // the same of w's blocks of rows, of which there are a multiple of `together`: as many at a time, or more
    template <class Take>
    INLINE void share_out(Queue queue, const Weight& w, int64_t together, Take take) const {
        const int64_t bytes = w.K * s.bits / 8 * ROWS * together, blocks = (w.N + ROWS - 1) / ROWS;
        share_out(queue, blocks / together, std::max<int64_t>(1, TAKE_BYTES / bytes),
                  [&](Range some) ALWAYS_INLINE { take(Range{some.first * together, some.last * together}); });
    }

    // some rows of y = chunks @ w^T, into columns of a matrix `stride` wide
    INLINE void multiply(const uint8_t* chunks, const Weight& w, float* y, int64_t stride, Range blocks) const {
        Matmul job{w, chunks, y, M, stride, FP32};
        does.matmul[s.bits == 8][s.planes == 2](&job, blocks.first, blocks.last);
    }

    INLINE void multiply(Queue queue, const Weight& w, float* y, int64_t stride) const {
        share_out(queue, w, 1, [&](Range blocks) ALWAYS_INLINE { multiply(mine.chunks, w, y, stride, blocks); });
    }

    INLINE void multiply_and_add(Queue queue, const uint8_t* chunks, const Weight& w, float* y) const {
        share_out(queue, w, 1, [&](Range blocks) ALWAYS_INLINE {
            multiply(chunks, w, y, s.D, blocks);
            const int64_t last = std::min(blocks.last * ROWS, w.N);
            for (int64_t m = 0; m < M; m++)
                for (int64_t n = blocks.first * ROWS; n < last; n++) s.x[m * s.D + n] += y[m * s.D + n];
        });
    }

    // of some columns, for `down`; all widths are multiples of 32
    INLINE void swiglu_to_integers(const Weight& down, Range blocks) const {
        using F = typename Lanes<W>::F;
        for (int64_t m = 0; m < M; m++) {
            for (int64_t i = blocks.first * ROWS; i < blocks.last * ROWS; i += W) {
                float* gate = mine.gate + m * s.inner + i;
                const F g = load<F>(gate), limited = g < -80.0f ? F{} - 80.0f : g;
                store(gate, g / (1 + exponential<W>(-limited)) * load<F>(mine.up + m * s.inner + i));
            }
            const int64_t row = m * (s.inner / CHUNK);
            to_integers(mine.gate, down, mine.inner_chunks,
                        {row + blocks.first * ROWS / CHUNK, row + blocks.last * ROWS / CHUNK});
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

    // of each key head, and what it gives as integers
    template <class Of>
    INLINE void attention(const Layer& layer) const {
        const int64_t per_row = s.H * s.Hd / CHUNK, per_head = per_row / s.KvH;
        share_out(ATTENTION, s.B * s.KvH, 1, [&](Range heads) ALWAYS_INLINE {
            const int64_t b = heads.first / s.KvH, head = heads.first % s.KvH;
            attend<Of>(s, layer, mine, b, head, thread);
            for (int64_t m = b * s.T; m < (b + 1) * s.T; m++) {
                const int64_t first = m * per_row + head * per_head;
                to_integers(mine.attended, layer.o, mine.chunks, {first, first + per_head});
            }
        });
    }

    INLINE void attention(const Layer& layer) const {
        if (s.cache_kind == FP32) return attention<Floats<W, FP32>>(layer);
#ifdef X86
        if constexpr (W == 16)
            if (s.cache_kind == INT8 && s.planes == 1 && s.Hd % 64 == 0) return attention<Bytes>(layer);
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
        const int64_t keys = s.H * s.Hd, values = keys + s.KvH * s.Hd, row = values + s.KvH * s.Hd;  // columns of qkv
        norm_to_integers(layer.norm1, layer.q);
        meet();
        multiply(Q, layer.q, mine.qkv, row);
        multiply(K, layer.k, mine.qkv + keys, row);
        multiply(V, layer.v, mine.qkv + values, row);
        meet();
        attention(layer);
        meet();
        multiply_and_add(O, mine.chunks, layer.o, mine.h);
        meet();
        norm_to_integers(layer.norm2, layer.gate);
        meet();
        share_out(GATE_UP, layer.gate, CHUNK / ROWS, [&](Range blocks) ALWAYS_INLINE {
            multiply(mine.chunks, layer.gate, mine.gate, s.inner, blocks);
            multiply(mine.chunks, layer.up, mine.up, s.inner, blocks);
            swiglu_to_integers(layer.down, blocks);
        });
        meet();
        multiply_and_add(DOWN, mine.inner_chunks, layer.down, mine.h);
        meet();
    }

    INLINE void run() const {
        for (int queue = 0; queue < QUEUES; queue++) mine.taken[queue * threads + thread].count = 0;
        look();
        for (int64_t i = 0; i < s.count; i++) block(s.layers[i]);
        const Range rows(M, thread, threads);
        for (int64_t m = rows.first; m < rows.last; m++)
            normalise<W>(s.x + m * s.D, s.norm, s.eps, s.D, 0, s.D, s.x + m * s.D);
    }
};

struct Job {
    const Step* step;
    int isa;
};

// Which thread this is, the region says: it may have fewer than were asked for.
template <int W>
INLINE void one_thread(void* pointer) {
    const auto [s, isa] = *static_cast<Job*>(pointer);
    const int threads = omp_get_num_threads ? omp_get_num_threads() : 1;
    const int thread = omp_get_thread_num ? omp_get_thread_num() : 0;
    Thread<W>{*s, instance(isa), Scratch(*s, threads), thread, threads, s->B * s->T, isa == AVX512_BF16}.run();
}

void step_portable(void* job, int64_t, int64_t) { one_thread<4>(job); }
#ifdef X86
TARGET_AVX2 void step_avx2(void* job, int64_t, int64_t) { one_thread<8>(job); }
TARGET_AVX512 void step_avx512(void* job, int64_t, int64_t) { one_thread<16>(job); }
#endif

}  // namespace

extern "C" {

int64_t step_scratch(const Step* s, int threads) { return Scratch(*s, threads).bytes; }

void step(const Step* s, int isa, int threads) {
    Work work = step_portable;
#ifdef X86
    if (isa == AVX2) work = step_avx2;
    if (isa >= AVX512) work = step_avx512;
#endif
    Job job{s, isa};
    parallel(work, &job, threads, GOMP_barrier ? threads : 1);
}

}  // extern "C"
