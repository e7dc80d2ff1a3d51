// Training and evaluation of small networks that are chains: convolutions (stride 1, no padding), ReLU,
// 2x2 max-pools, fully connected layers, cross-entropy; by SGD.
//
// Sixteen samples stand side by side in the lanes of a vector, so that every multiplication of every
// layer, in both directions, uses full vectors whatever the number of channels; an activation is
// [channels][height][width] of such vectors, and those of sixteen samples stay in the second-level
// cache from the first layer to the last gradient. Built by compiled.py with the machine's own
// compiler, once per REAL.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int LANES = 16;
constexpr int TILE = 5;  // output channels that are computed together: their sums stay in registers
typedef REAL real;
typedef real lanes __attribute__((vector_size(LANES * sizeof(real))));

// One layer as chain.py describes it: a convolution; fully connected is one of a 1x1 image.
struct Layer {
    int64_t in, height, width, out, kernel, relu, pool, weight, bias;
    int64_t rows() const { return height - kernel + 1; }
    int64_t columns() const { return width - kernel + 1; }
    int64_t inputs() const { return in * height * width; }
    int64_t outputs() const { return out * rows() * columns(); }
    int64_t passed() const { return pool ? out * (rows() / 2) * (columns() / 2) : outputs(); }
    int64_t weights() const { return out * in * kernel * kernel; }
};

lanes all(real value) { return lanes{} + value; }
real sum(const lanes& v) {
    real total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// out[o][y][x] = bias[o] + sum over c, i, j of weight[o][c][i][j] * in[c][y+i-up][x+j], o in a tile of N.
// Rows of `in` outside 0..height are zeros. `stride`, `row` are in's channel and row strides.
template <int K, int N, int X>
inline void tile(const lanes* in, int64_t channels, int64_t height, int64_t stride, int64_t row, int64_t up, int64_t y,
                 int64_t x, const real* weight, int64_t apart, const real* bias, lanes* out, int64_t plane) {
    lanes sums[N][X];
    for (int n = 0; n < N; n++)
        for (int s = 0; s < X; s++) sums[n][s] = all(bias ? bias[n] : 0);
    const int64_t first = up > y ? up - y : 0;
    const int64_t last = height + up - y < K ? height + up - y : K;
    for (int64_t c = 0; c < channels; c++)
        for (int64_t i = first; i < last; i++) {
            const lanes* from = in + c * stride + (y + i - up) * row + x;
            const real* w = weight + (c * K + i) * K;
#pragma GCC unroll 8
            for (int j = 0; j < K; j++)
#pragma GCC unroll 8
                for (int n = 0; n < N; n++)
#pragma GCC unroll 8
                    for (int s = 0; s < X; s++) sums[n][s] += w[n * apart + j] * from[j + s];
        }
    for (int n = 0; n < N; n++)
        for (int s = 0; s < X; s++) out[n * plane + s] = sums[n][s];
}

template <int K, int N>
void correlate(const lanes* in, int64_t channels, int64_t height, int64_t stride, int64_t row, int64_t up,
               int64_t rows, int64_t columns, const real* weight, int64_t apart, const real* bias, lanes* out) {
    const int64_t plane = rows * columns;
    for (int64_t y = 0; y < rows; y++) {
        int64_t x = 0;
        for (; x + 2 <= columns; x += 2)
            tile<K, N, 2>(in, channels, height, stride, row, up, y, x, weight, apart, bias, out + y * columns + x, plane);
        for (; x < columns; x++)
            tile<K, N, 1>(in, channels, height, stride, row, up, y, x, weight, apart, bias, out + y * columns + x, plane);
    }
}

// gradient[o][c][i][j] += sum over y, x of g[o][y][x] * in[c][y+i][x+j], lane by lane, o in a tile of N.
template <int K, int N>
void weigh(const Layer& l, const lanes* in, const lanes* g, int64_t row, lanes* gradient) {
    const int64_t rows = l.rows(), columns = l.columns(), apart = l.in * K * K;
    for (int64_t c = 0; c < l.in; c++)
        for (int64_t i = 0; i < K; i++) {
            lanes sums[N][K];
            lanes* to = gradient + (c * K + i) * K;
            for (int n = 0; n < N; n++)
                for (int j = 0; j < K; j++) sums[n][j] = to[n * apart + j];
            for (int64_t y = 0; y < rows; y++) {
                const lanes* from = in + (c * l.height + y + i) * l.width;
                const lanes* by = g + y * row;
                for (int64_t x = 0; x < columns; x++)
#pragma GCC unroll 8
                    for (int n = 0; n < N; n++)
#pragma GCC unroll 8
                        for (int j = 0; j < K; j++) sums[n][j] += by[n * rows * row + x] * from[x + j];
            }
            for (int n = 0; n < N; n++)
                for (int j = 0; j < K; j++) to[n * apart + j] = sums[n][j];
        }
}

// Calls f<K, N>(first, ...) for tiles of about equal size that cover `out` channels.
#define EACH_TILE(out, K, call)                                                        \
    for (int64_t tiles = ((out) + TILE - 1) / TILE, t = 0, o = 0; t < tiles; t++) {     \
        const int64_t n = ((out) - o + tiles - t - 1) / (tiles - t);                    \
        switch (n) {                                                                    \
            case 1: { constexpr int N = 1; call; break; }                               \
            case 2: { constexpr int N = 2; call; break; }                               \
            case 3: { constexpr int N = 3; call; break; }                               \
            case 4: { constexpr int N = 4; call; break; }                               \
            case 5: { constexpr int N = 5; call; break; }                               \
        }                                                                               \
        o += n;                                                                         \
    }
#define EACH_KERNEL(k, call)                              \
    switch (k) {                                          \
        case 1: { constexpr int K = 1; call; break; }     \
        case 3: { constexpr int K = 3; call; break; }     \
        case 5: { constexpr int K = 5; call; break; }     \
    }

// The gradient before the pool stands between columns of zeros where the layer below wants its own.
int64_t margin(const Layer& l, bool first) { return first ? 0 : l.kernel - 1; }

struct Network {
    Layer* layers;
    int64_t depth, parameters;
    lanes* input;      // sixteen samples
    lanes* totals;     // [parameters] gradients, lane by lane
    lanes** before;    // [depth] outputs before the pool
    lanes** after;     // [depth] what is passed on
    lanes** gradient;  // [depth] gradients before the pool, with margins
    lanes** passed;    // [depth] gradients of what is passed on
    real* turned;      // weights of one layer, turned for the gradient of its input
};

// All in one piece of memory, zeroed: margins, and what a pool leaves out at an odd edge, stay zero.
Network* make(const Layer* layers, int64_t depth, int64_t parameters) {
    int64_t vectors = layers[0].inputs() + parameters, turned = 0;
    for (int64_t d = 0; d < depth; d++) {
        const Layer& l = layers[d];
        vectors += l.outputs() + 2 * l.passed() + l.out * l.rows() * (l.columns() + 2 * margin(l, d == 0));
        turned = l.weights() > turned ? l.weights() : turned;
    }
    const size_t head = sizeof(Network) + depth * (sizeof(Layer) + 4 * sizeof(lanes*));
    const size_t start = (head + sizeof(lanes) - 1) / sizeof(lanes) * sizeof(lanes);
    const size_t bytes = start + vectors * sizeof(lanes) + (turned * sizeof(real) / sizeof(lanes) + 1) * sizeof(lanes);
    char* memory = (char*)aligned_alloc(sizeof(lanes), bytes);
    if (!memory) return nullptr;
    memset(memory, 0, bytes);
    Network& net = *(Network*)memory;
    net.depth = depth, net.parameters = parameters;
    net.layers = (Layer*)(memory + sizeof(Network));
    memcpy(net.layers, layers, depth * sizeof(Layer));
    net.before = (lanes**)(net.layers + depth);
    net.after = net.before + depth, net.gradient = net.after + depth, net.passed = net.gradient + depth;
    lanes* at = (lanes*)(memory + start);
    auto take = [&](int64_t n) { lanes* was = at; at += n; return was; };
    net.input = take(layers[0].inputs());
    net.totals = take(parameters);
    for (int64_t d = 0; d < depth; d++) {
        const Layer& l = layers[d];
        net.before[d] = take(l.outputs());
        net.after[d] = l.pool ? take(l.passed()) : net.before[d];
        net.gradient[d] = take(l.out * l.rows() * (l.columns() + 2 * margin(l, d == 0)));
        net.passed[d] = take(l.passed());
    }
    net.turned = (real*)at;
    return &net;
}

// NaN stays NaN, as in torch.
inline lanes rectified(lanes v) { return v < 0 ? lanes{} : v; }
inline lanes larger(lanes a, lanes b) { return (b > a) | (b != b) ? b : a; }

// One of the four steps that turn sixteen samples' sixteen numbers into sixteen vectors of a number each.
inline void interleave(const lanes* from, lanes* to) {
#ifdef __clang__
#define WOVEN(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
    typedef decltype(lanes{} < lanes{}) places;
#define WOVEN(a, b, ...) __builtin_shuffle(a, b, places{__VA_ARGS__})
#endif
    for (int i = 0; i < LANES / 2; i++) {
        const lanes a = from[i], b = from[i + LANES / 2];
        to[2 * i] = WOVEN(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        to[2 * i + 1] = WOVEN(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
}

// Samples into lanes; the lanes after `count` are zero.
void gather(const Network& net, const real* images, const int64_t* samples, int64_t count) {
    const int64_t size = net.layers[0].inputs();
    int64_t start = 0;
    for (; start + LANES <= size; start += LANES) {
        lanes a[LANES], b[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            if (lane < count)
                memcpy((void*)(a + lane), images + samples[lane] * size + start, sizeof(lanes));
            else
                a[lane] = lanes{};
        }
        interleave(a, b), interleave(b, a), interleave(a, b), interleave(b, net.input + start);
    }
    for (; start < size; start++)
        for (int lane = 0; lane < LANES; lane++)
            net.input[start][lane] = lane < count ? images[samples[lane] * size + start] : 0;
}

void forward(const Network& net, const real* parameters) {
    const lanes* in = net.input;
    for (int64_t d = 0; d < net.depth; d++) {
        const Layer& l = net.layers[d];
        const int64_t rows = l.rows(), columns = l.columns(), each = l.in * l.kernel * l.kernel;
        const real *weight = parameters + l.weight, *bias = parameters + l.bias;
        lanes* out = net.before[d];
        EACH_KERNEL(l.kernel, EACH_TILE(l.out, K, (correlate<K, N>(
            in, l.in, l.height, l.height * l.width, l.width, 0, rows, columns,
            weight + o * each, each, bias + o, out + o * rows * columns))))
        lanes* passed = net.after[d];
        if (l.pool) {
            for (int64_t c = 0; c < l.out; c++)
                for (int64_t y = 0; y + 1 < rows; y += 2) {
                    const lanes* upper = out + (c * rows + y) * columns;
                    const lanes* lower = upper + columns;
                    for (int64_t x = 0; x + 1 < columns; x += 2, passed++) {
                        const lanes most = larger(larger(upper[x], upper[x + 1]), larger(lower[x], lower[x + 1]));
                        *passed = l.relu ? rectified(most) : most;
                    }
                }
        } else if (l.relu) {
            for (int64_t i = 0; i < l.outputs(); i++) out[i] = rectified(out[i]);
        }
        in = net.after[d];
    }
}

// Loss of each lane; with `gradient` that of the logits too, divided by `batch`, zero in unused lanes.
lanes entropy(const Network& net, const int64_t* labels, const int64_t* samples, int64_t count, int64_t batch,
              bool gradient, int64_t* correct) {
    const int64_t classes = net.layers[net.depth - 1].out;
    const lanes* logits = net.after[net.depth - 1];
    lanes most = logits[0];
    for (int64_t k = 1; k < classes; k++) most = larger(most, logits[k]);
    lanes total{}, losses{};
    for (int lane = 0; lane < count; lane++) {
        for (int64_t k = 0; k < classes; k++) total[lane] += std::exp(logits[k][lane] - most[lane]);
        const int64_t label = labels[samples[lane]];
        losses[lane] = std::log(total[lane]) - (logits[label][lane] - most[lane]);
        if (correct) {
            int64_t best = 0;  // the first of equals, and NaN above all, as torch's argmax
            while (logits[best][lane] == logits[best][lane] && logits[best][lane] < most[lane]) best++;
            *correct += best == label;
        }
    }
    if (gradient) {
        lanes* to = net.passed[net.depth - 1];
        for (int64_t k = 0; k < classes; k++)
            for (int lane = 0; lane < LANES; lane++)
                to[k][lane] = lane >= count ? 0
                    : (std::exp(logits[k][lane] - most[lane]) / total[lane] - (labels[samples[lane]] == k)) / batch;
    }
    return losses;
}

// From the gradient of what a layer passed on to that of its output before pool and ReLU, with margins.
void unpool(const Network& net, int64_t d) {
    const Layer& l = net.layers[d];
    const int64_t rows = l.rows(), columns = l.columns(), side = margin(l, d == 0), row = columns + 2 * side;
    const lanes *g = net.passed[d], *after = net.after[d];
    for (int64_t c = 0; c < l.out; c++) {
        lanes* to = net.gradient[d] + c * rows * row + side;
        if (!l.pool) {
            for (int64_t y = 0; y < rows; y++)
                for (int64_t x = 0; x < columns; x++, g++, after++)
                    to[y * row + x] = l.relu ? (*after <= 0 ? lanes{} : *g) : *g;
            continue;
        }
        // What a pool leaves out at an odd edge keeps the zero it was made with.
        const lanes* z = net.before[d] + c * rows * columns;
        for (int64_t y = 0; y + 1 < rows; y += 2)
            for (int64_t x = 0; x + 1 < columns; x += 2, g++, after++) {
                const lanes* at = z + y * columns + x;
                lanes most = larger(larger(at[0], at[1]), larger(at[columns], at[columns + 1]));
                lanes left = l.relu ? (*after <= 0 ? lanes{} : *g) : *g;
                lanes* into = to + y * row + x;
                auto give = [&](const lanes& from, lanes& there) {  // to the first of equals
                    const auto wins = (from == most) | (from != from);
                    there = wins ? left : lanes{};
                    left = wins ? lanes{} : left;
                };
                give(at[0], into[0]);
                give(at[1], into[1]);
                give(at[columns], into[row]);
                give(at[columns + 1], into[row + 1]);
            }
    }
}

void backward(const Network& net, const real* parameters, lanes* gradients) {
    for (int64_t d = net.depth - 1; d >= 0; d--) {
        const Layer& l = net.layers[d];
        const int64_t rows = l.rows(), side = margin(l, d == 0), row = l.columns() + 2 * side;
        const int64_t each = l.in * l.kernel * l.kernel, squared = l.kernel * l.kernel;
        unpool(net, d);
        const lanes* g = net.gradient[d];
        const lanes* in = d ? net.after[d - 1] : net.input;
        for (int64_t o = 0; o < l.out; o++) {
            lanes total{};
            for (int64_t y = 0; y < rows; y++)
                for (int64_t x = 0; x < l.columns(); x++) total += g[(o * rows + y) * row + side + x];
            gradients[l.bias + o] += total;
        }
        EACH_KERNEL(l.kernel, EACH_TILE(l.out, K, (weigh<K, N>(
            l, in, g + o * rows * row + side, row, gradients + l.weight + o * each))))
        if (!d) return;
        for (int64_t c = 0; c < l.in; c++)
            for (int64_t o = 0; o < l.out; o++)
                for (int64_t q = 0; q < squared; q++)
                    net.turned[(c * l.out + o) * squared + q] =
                        parameters[l.weight + (o * l.in + c) * squared + squared - 1 - q];
        EACH_KERNEL(l.kernel, EACH_TILE(l.in, K, (correlate<K, N>(
            g, l.out, rows, rows * row, row, K - 1, l.height, l.width,
            net.turned + o * l.out * squared, l.out * squared, nullptr, net.passed[d - 1] + o * l.height * l.width))))
    }
}

}  // namespace

extern "C" {

// A network's working memory, null where there is none to be had. `layers` is copied.
void* chain_new(const Layer* layers, int64_t depth, int64_t parameters) {
    return make(layers, depth, parameters);
}
void chain_free(void* chain) { free(chain); }

struct Rule { double lr, momentum, weight_decay; int64_t nesterov; };

// One minibatch of SGD: the `size` samples at `samples`. `parameters` and `momenta` change in place; the mean loss
// goes to `loss`.
void chain_step(void* chain, real* parameters, real* momenta, const real* images, const int64_t* labels,
                const int64_t* samples, int64_t size, const Rule* rule, real* loss) {
    const Network& net = *(Network*)chain;
    memset((void*)net.totals, 0, net.parameters * sizeof(lanes));
    lanes losses{};
    for (int64_t start = 0; start < size; start += LANES) {
        const int64_t count = size - start < LANES ? size - start : LANES;
        gather(net, images, samples + start, count);
        forward(net, parameters);
        losses += entropy(net, labels, samples + start, count, size, true, nullptr);
        backward(net, parameters, net.totals);
    }
    *loss = sum(losses) / size;
    const real lr = rule->lr, momentum = rule->momentum, decay = rule->weight_decay;
    for (int64_t i = 0; i < net.parameters; i++) {
        const real g = sum(net.totals[i]) + decay * parameters[i];
        momenta[i] = momentum * momenta[i] + g;
        parameters[i] -= lr * (rule->nesterov ? g + momentum * momenta[i] : momenta[i]);
    }
}

// Sums over the first `size` samples: of the losses, of their squares, of correct answers.
void chain_measure(void* chain, const real* parameters, const real* images, const int64_t* labels, int64_t size,
                   double* loss, double* square, int64_t* correct) {
    const Network& net = *(Network*)chain;
    for (int64_t first = 0; first < size; first += LANES) {
        int64_t at[LANES], count = 0;
        for (; count < LANES && first + count < size; count++) at[count] = first + count;
        gather(net, images, at, count);
        forward(net, parameters);
        const lanes losses = entropy(net, labels, at, count, 1, false, correct);
        for (int64_t i = 0; i < count; i++) {
            *loss += losses[i];
            *square += (double)losses[i] * losses[i];
        }
    }
}

}  // extern "C"
