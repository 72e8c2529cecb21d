// 3×3 convolutions by minimal filtering, F(2×2, 3×3), with AVX-512 bf16: see winograd.py.
//
// Lavin & Gray 2016 (arXiv:1509.09308), §4.1: a tile of 2×2 outputs takes 16 products of a channel
// instead of 36. Maps are channels-last bf16; transforms and sums are fp32. Every product of
// matrices multiplies pairs: the instruction (dpbf16) adds a[2i]·b[2i] + a[2i+1]·b[2i+1] to an fp32.
// Tiles go through all steps in blocks, so that what the transforms make fourfold stays in the cache.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <immintrin.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

namespace {

using at::BFloat16;
using Pair = std::int32_t;          // two bf16
using Patch = const BFloat16*[16];  // the 4×4 pixels that a tile sees, row by row
using Vector = __m512;              // 16 channels in fp32

constexpr std::int64_t POINTS = 16;  // at which the polynomials are multiplied: 4×4
constexpr std::int64_t PANEL = 64;   // columns of a product at a time
constexpr std::int64_t FORWARD_TILES = 96;    // of a block at most, by trial
constexpr std::int64_t GRADIENT_TILES = 256;  // of a block, by trial
constexpr std::int64_t SKEW = 64;  // so that a tile's points do not share a set of the cache

// --- channels in and out ----------------------------------------------------------------------

inline Vector load(const BFloat16* from) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

inline void store(BFloat16* to, Vector v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(v));
}

// a, then b: 32 channels.
inline void store_two(BFloat16* to, Vector a, Vector b) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a));
}

// The even or odd ones of 32 channels.
inline Vector load_half(const BFloat16* from, bool odd) {
  const __m512i both = _mm512_loadu_si512(from);
  return _mm512_castsi512_ps(odd ? _mm512_and_si512(both, _mm512_set1_epi32(0xffff0000))
                                 : _mm512_slli_epi32(both, 16));
}

// a0 b0 a1 b1 …
inline void store_pairs(Pair* to, Vector a, Vector b) {
  const __m512i order =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                       23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
}

// --- transforms (Lavin & Gray, equations 8 to 10), rows first, then columns --------------------

// Bᵀ d B of the input's 4×4, whose channels `get` loads.
template <typename Get>
inline void of_input(const Patch& d, const Get& get, Vector* v) {
  Vector r[16];
  for (int j = 0; j < 4; ++j) {
    const Vector d0 = get(d[j]), d1 = get(d[4 + j]), d2 = get(d[8 + j]), d3 = get(d[12 + j]);
    r[j] = d0 - d2, r[4 + j] = d1 + d2, r[8 + j] = d2 - d1, r[12 + j] = d1 - d3;
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = r[i] - r[i + 2], v[i + 1] = r[i + 1] + r[i + 2];
    v[i + 2] = r[i + 2] - r[i + 1], v[i + 3] = r[i + 1] - r[i + 3];
  }
}

// Aᵀ m A: 4×4 → 2×2.
inline void to_output(const Vector* m, Vector* y) {
  Vector r[8];
  for (int j = 0; j < 4; ++j) {
    r[j] = m[j] + m[4 + j] + m[8 + j], r[4 + j] = m[4 + j] - m[8 + j] - m[12 + j];
  }
  for (int i = 0; i < 2; ++i) {
    const Vector* q = r + 4 * i;
    y[2 * i] = q[0] + q[1] + q[2], y[2 * i + 1] = q[1] - q[2] - q[3];
  }
}

// Its transpose, A g Aᵀ, of the output's gradient: the middle 2×2 of a patch → 4×4.
inline void of_gradient(const Patch& g, std::int64_t channel, Vector* q) {
  const Vector zero = _mm512_setzero_ps();
  Vector r[8];
  for (int j = 0; j < 2; ++j) {
    const Vector a = load(g[5 + j] + channel), b = load(g[9 + j] + channel);
    r[j] = a, r[2 + j] = a + b, r[4 + j] = a - b, r[6 + j] = zero - b;
  }
  for (int i = 0; i < 4; ++i) {
    const Vector a = r[2 * i], b = r[2 * i + 1];
    q[4 * i] = a, q[4 * i + 1] = a + b, q[4 * i + 2] = a - b, q[4 * i + 3] = zero - b;
  }
}

// G w Gᵀ: 3×3 → 4×4.
inline void of_weight(const Vector* w, Vector* u) {
  const Vector half = _mm512_set1_ps(.5f);
  Vector r[12];
  for (int j = 0; j < 3; ++j) {
    const Vector outer = (w[j] + w[6 + j]) * half, middle = w[3 + j] * half;
    r[j] = w[j], r[3 + j] = outer + middle, r[6 + j] = outer - middle, r[9 + j] = w[6 + j];
  }
  for (int i = 0; i < 4; ++i) {
    const Vector *q = r + 3 * i, outer = (q[0] + q[2]) * half, middle = q[1] * half;
    u[4 * i] = q[0], u[4 * i + 1] = outer + middle;
    u[4 * i + 2] = outer - middle, u[4 * i + 3] = q[2];
  }
}

// Its transpose, Gᵀ u G: 4×4 → 3×3.
inline void to_weight(const Vector* u, Vector* w) {
  const Vector half = _mm512_set1_ps(.5f);
  Vector r[12];
  for (int j = 0; j < 4; ++j) {
    const Vector middle = (u[4 + j] + u[8 + j]) * half;
    r[j] = u[j] + middle, r[4 + j] = (u[4 + j] - u[8 + j]) * half, r[8 + j] = middle + u[12 + j];
  }
  for (int i = 0; i < 3; ++i) {
    const Vector *q = r + 4 * i, middle = (q[1] + q[2]) * half;
    w[3 * i] = q[0] + middle, w[3 * i + 1] = (q[1] - q[2]) * half, w[3 * i + 2] = middle + q[3];
  }
}

// --- products of matrices ---------------------------------------------------------------------

// Pairs (rows, steps), at any strides: row and step.
struct Left {
  const Pair* at;
  std::int64_t row, step;
};

// Pairs (steps, columns), the columns side by side.
struct Right {
  const Pair* at;
  std::int64_t step;
};

// fp32 (rows, columns).
struct Sums {
  float* at;
  std::int64_t row;
};

template <int ROWS>
inline void multiply_rows(Left a, Right b, std::int64_t steps, Sums c, bool add) {
  constexpr int VECTORS = PANEL / 16;
  Vector sum[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j)
      sum[i][j] = add ? _mm512_loadu_ps(c.at + i * c.row + 16 * j) : _mm512_setzero_ps();
  for (std::int64_t s = 0; s < steps; ++s) {
    __m512bh right[VECTORS];
    for (int j = 0; j < VECTORS; ++j)
      right[j] = (__m512bh)_mm512_loadu_si512(b.at + s * b.step + 16 * j);
    for (int i = 0; i < ROWS; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(a.at[i * a.row + s * a.step]);
      for (int j = 0; j < VECTORS; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) _mm512_storeu_ps(c.at + i * c.row + 16 * j, sum[i][j]);
}

// c = a · b, or c + a · b; PANEL columns.
void multiply(std::int64_t rows, Left a, Right b, std::int64_t steps, Sums c, bool add) {
  for (; rows >= 6; rows -= 6, a.at += 6 * a.row, c.at += 6 * c.row)  // 24 sums of 32 registers
    multiply_rows<6>(a, b, steps, c, add);
  switch (rows) {
    case 5: return multiply_rows<5>(a, b, steps, c, add);
    case 4: return multiply_rows<4>(a, b, steps, c, add);
    case 3: return multiply_rows<3>(a, b, steps, c, add);
    case 2: return multiply_rows<2>(a, b, steps, c, add);
    case 1: return multiply_rows<1>(a, b, steps, c, add);
  }
}

// --- maps and weights -------------------------------------------------------------------------

// Maps (B, C, H, W), channels-last, as tiles of 2×2 pixels, image by image and row by row.
class Tiles {
 public:
  explicit Tiles(const at::Tensor& maps)
      : count(maps.size(0) * (maps.size(2) / 2) * (maps.size(3) / 2)), channels(maps.size(1)),
        height_(maps.size(2)), width_(maps.size(3)), pixels_(maps.data_ptr<BFloat16>()),
        nothing_(at::zeros({channels}, maps.options())) {}

  // Its pixels and those around them; zeros beyond the image and beyond the last tile.
  void see(std::int64_t tile, Patch& patch) const {
    const BFloat16* const nothing = nothing_.data_ptr<BFloat16>();
    const auto [image, top, left] = place(tile);
    for (int i = 0; i < 4; ++i) {
      const std::int64_t y = top + i - 1;
      const bool exists = tile < count && 0 <= y && y < height_;
      for (int j = 0; j < 4; ++j) {
        const std::int64_t x = left + j - 1;
        const bool inside = exists && 0 <= x && x < width_;
        patch[4 * i + j] = inside ? pixel(image, y, x) : nothing;
      }
    }
  }

  // Its own 2×2.
  void own(std::int64_t tile, BFloat16** pixels) const {
    const auto [image, top, left] = place(tile);
    for (int i = 0; i < 4; ++i) pixels[i] = pixel(image, top + i / 2, left + i % 2);
  }

  const std::int64_t count, channels;

 private:
  std::tuple<std::int64_t, std::int64_t, std::int64_t> place(std::int64_t tile) const {
    const std::int64_t across = width_ / 2, down = height_ / 2;
    return {tile / (across * down), tile / across % down * 2, tile % across * 2};
  }

  BFloat16* pixel(std::int64_t image, std::int64_t y, std::int64_t x) const {
    return pixels_ + ((image * height_ + y) * width_ + x) * channels;
  }

  const std::int64_t height_, width_;
  BFloat16* const pixels_;
  const at::Tensor nothing_;
};

// Which input is the one, and which the other, of the pair `step` of a product: of 32, as
// `load_half` finds them, first the even ones, then the odd ones.
inline std::int64_t input_of(std::int64_t step, int one) {
  const std::int64_t group = step / 16 * 32, within = step % 16;
  return group + within % 8 * 4 + 2 * one + within / 8;
}

// A weight (K, 3, 3, C) → pairs (16, K/PANEL, C/2, PANEL) of its transform for y = w ∗ x.
void pack(const float* weight, std::int64_t K, std::int64_t C, Pair* to) {
  at::parallel_for(0, K / 16, 1, [&](std::int64_t from, std::int64_t until) {
    alignas(64) BFloat16 found[POINTS][16][16];  // of 16 outputs and 16 inputs
    for (std::int64_t k = 16 * from; k < 16 * until; k += 16)
      for (std::int64_t step = 0; step < C / 2; step += 8) {
        const __m512i which = _mm512_add_epi32(
            _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0),
            _mm512_set1_epi32(step / 8 % 2));
        for (int i = 0; i < 16; ++i) {
          Vector w[9], u[POINTS];
          for (int e = 0; e < 9; ++e) {
            const float* const at = weight + ((k + i) * 9 + e) * C + step / 16 * 32;
            w[e] = _mm512_permutex2var_ps(_mm512_loadu_ps(at), which, _mm512_loadu_ps(at + 16));
          }
          of_weight(w, u);
          for (int p = 0; p < POINTS; ++p) store(found[p][i], u[p]);
        }
        for (int p = 0; p < POINTS; ++p)
          for (int s = 0; s < 8; ++s) {
            const std::int64_t panel = p * K / PANEL + k / PANEL;
            Pair* const row = to + (panel * C / 2 + step + s) * PANEL + k % PANEL;
            for (int i = 0; i < 16; ++i) row[i] = reinterpret_cast<const Pair*>(found[p][i])[s];
          }
      }
  });
}

// The same (16, C/PANEL, K/2, PANEL) for the gradient of x: inputs and outputs change places, and
// the kernel is turned by 180°.
void pack_turned(const float* weight, std::int64_t K, std::int64_t C, Pair* to) {
  at::parallel_for(0, K / 2, 1, [&](std::int64_t from, std::int64_t until) {
    for (std::int64_t step = from; step < until; ++step)
      for (std::int64_t c = 0; c < C; c += 16) {
        Vector w[9], u[2][POINTS];
        for (int one = 0; one < 2; ++one) {
          const float* const at = weight + input_of(step, one) * 9 * C + c;
          for (int e = 0; e < 9; ++e) w[8 - e] = _mm512_loadu_ps(at + e * C);
          of_weight(w, u[one]);
        }
        for (int p = 0; p < POINTS; ++p) {
          const std::int64_t panel = p * C / PANEL + c / PANEL;
          store_pairs(to + (panel * K / 2 + step) * PANEL + c % PANEL, u[0][p], u[1][p]);
        }
      }
  });
}

// --- the two operators ------------------------------------------------------------------------

// Pointers go through maps unchecked: what `winograd.fits` lets through, and nothing else.
void expect(const at::Tensor& maps, std::int64_t channels) {
  TORCH_CHECK(maps.dim() == 4 && maps.size(1) == channels && channels % PANEL == 0 &&
                  maps.size(2) % 2 == 0 && maps.size(3) % 2 == 0,
              "maps must be (B, ", channels, ", H, W), with even sides and a multiple of ", PANEL,
              " channels, and are ", maps.sizes(), ".");
}

at::Tensor channels_last(const at::Tensor& maps) {
  return maps.contiguous(at::MemoryFormat::ChannelsLast);
}

// Runs work(part, first block, block after its last) for parts of the blocks, one to a thread.
template <typename Work>
void share(std::int64_t blocks, std::int64_t parts, const Work& work) {
  at::parallel_for(0, parts, 1, [&](std::int64_t from, std::int64_t until) {
    for (std::int64_t p = from; p < until; ++p)
      work(p, blocks * p / parts, blocks * (p + 1) / parts);
  });
}

std::int64_t divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// x (B, C, H, W), weight (K, C, 3, 3) → y (B, K, H, W); or, turned, y's gradient → x's.
at::Tensor convolve(const at::Tensor& maps, const at::Tensor& weight_, bool turned) {
  TORCH_CHECK(weight_.dim() == 4 && weight_.size(2) == 3 && weight_.size(3) == 3,
              "weight must be (K, C, 3, 3), and is ", weight_.sizes(), ".");
  const std::int64_t K = weight_.size(0), C = weight_.size(1);
  const std::int64_t inputs = turned ? K : C, outputs = turned ? C : K;
  TORCH_CHECK(outputs % PANEL == 0, "A multiple of ", PANEL, " outputs is needed, not ", outputs);
  expect(maps, inputs);
  const at::Tensor x = channels_last(maps), weight = channels_last(weight_);
  const auto y = at::empty({x.size(0), outputs, x.size(2), x.size(3)}, x.options(),
                           at::MemoryFormat::ChannelsLast);
  const auto packed = at::empty({POINTS * K * C}, x.options());
  Pair* const U = reinterpret_cast<Pair*>(packed.data_ptr());
  (turned ? pack_turned : pack)(weight.data_ptr<float>(), K, C, U);

  const Tiles from(x), to(y);
  const std::int64_t threads = at::get_num_threads();
  // Blocks of one size, as many for one thread as for another.
  const std::int64_t turns = from.count / (threads * FORWARD_TILES) + 1;
  const std::int64_t size = std::max<std::int64_t>(divide(from.count, threads * turns), 1);
  const std::int64_t blocks = divide(from.count, size), parts = std::min(threads, blocks);
  const std::int64_t point = size * inputs + SKEW, sums = size * PANEL + SKEW;
  const auto inner = at::empty({parts, POINTS * point}, x.options());
  const auto outer = at::empty({parts, POINTS * sums}, x.options().dtype(at::kFloat));
  share(blocks, parts, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
    BFloat16* const V = inner.data_ptr<BFloat16>() + part * POINTS * point;
    float* const M = outer.data_ptr<float>() + part * POINTS * sums;
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t first = block * size, tiles = std::min(size, from.count - first);
      for (std::int64_t t = 0; t < tiles; ++t) {
        Patch patch;
        from.see(first + t, patch);
        for (std::int64_t c = 0; c < inputs; c += 32) {
          Vector v[2][POINTS];
          for (int odd = 0; odd < 2; ++odd)
            of_input(
                patch, [=](const BFloat16* pixel) { return load_half(pixel + c, odd); }, v[odd]);
          for (int p = 0; p < POINTS; ++p)
            store_two(V + p * point + t * inputs + c, v[0][p], v[1][p]);
        }
      }
      for (std::int64_t k = 0; k < outputs; k += PANEL) {
        for (int p = 0; p < POINTS; ++p)
          multiply(tiles, {reinterpret_cast<const Pair*>(V + p * point), inputs / 2, 1},
                   {U + (p * outputs + k) * inputs / 2, PANEL}, inputs / 2, {M + p * sums, PANEL},
                   false);
        for (std::int64_t t = 0; t < tiles; ++t) {
          BFloat16* pixels[4];
          to.own(first + t, pixels);
          for (std::int64_t c = 0; c < PANEL; c += 32) {
            Vector m[POINTS], found[2][4];
            for (int half = 0; half < 2; ++half) {
              const float* const sum = M + t * PANEL + c + 16 * half;
              for (int p = 0; p < POINTS; ++p) m[p] = _mm512_loadu_ps(sum + p * sums);
              to_output(m, found[half]);
            }
            for (int i = 0; i < 4; ++i) store_two(pixels[i] + k + c, found[0][i], found[1][i]);
          }
        }
      }
    }
  });
  return y;
}

// x (B, C, H, W), y's gradient (B, K, H, W) → the weight's (K, C, 3, 3), fp32.
at::Tensor weight_gradient(const at::Tensor& maps, const at::Tensor& gradient) {
  expect(maps, maps.size(1));
  expect(gradient, gradient.size(1));
  for (const int side : {0, 2, 3})
    TORCH_CHECK(maps.size(side) == gradient.size(side), "maps ", maps.sizes(), " and gradient ",
                gradient.sizes(), " differ in batch or side.");
  const at::Tensor x = channels_last(maps), g = channels_last(gradient);
  const Tiles seen(x), felt(g);
  const std::int64_t C = seen.channels, K = felt.channels;
  const std::int64_t threads = at::get_num_threads();
  // Many tiles: each thread transforms and multiplies its own, and has sums of its own. Few (deep
  // layers, whose sums are large): all transform, then share the products by point.
  const std::int64_t mine = divide(divide(seen.count, threads), 2) * 2;
  const bool apart = mine >= 4 * GRADIENT_TILES || C * K <= 128 * 128;
  const std::int64_t size = std::min(apart ? GRADIENT_TILES : 4 * GRADIENT_TILES,
                                     apart ? mine : divide(seen.count, 2) * 2);
  const std::int64_t blocks = divide(seen.count, size);
  const std::int64_t parts = apart ? std::min(threads, blocks) : 1;
  const std::int64_t v_point = size / 2 * C + SKEW, q_point = size / 2 * K + SKEW, sums = K * C;
  const auto left = at::empty({parts, POINTS * q_point}, x.options().dtype(at::kInt));
  const auto right = at::empty({parts, POINTS * v_point}, x.options().dtype(at::kInt));
  const auto totals = at::empty({parts, POINTS * sums}, x.options().dtype(at::kFloat));
  const auto data = [](const at::Tensor& t, std::int64_t part) {
    return t.data_ptr<Pair>() + part * t.stride(0);
  };

  // Pairs of neighbouring tiles, `from` to `until`, of the block at tile `first`.
  const auto transform = [&](std::int64_t part, std::int64_t first, std::int64_t from,
                             std::int64_t until) {
    Pair *const Q = data(left, part), *const V = data(right, part);
    Patch patch[2];
    Vector value[2][POINTS];
    for (std::int64_t s = from; s < until; ++s) {
      for (int i = 0; i < 2; ++i) seen.see(first + 2 * s + i, patch[i]);
      for (std::int64_t c = 0; c < C; c += 16) {
        for (int i = 0; i < 2; ++i)
          of_input(
              patch[i], [=](const BFloat16* pixel) { return load(pixel + c); }, value[i]);
        for (int p = 0; p < POINTS; ++p)
          store_pairs(V + p * v_point + s * C + c, value[0][p], value[1][p]);
      }
      for (int i = 0; i < 2; ++i) felt.see(first + 2 * s + i, patch[i]);
      for (std::int64_t k = 0; k < K; k += 16) {
        for (int i = 0; i < 2; ++i) of_gradient(patch[i], k, value[i]);
        for (int p = 0; p < POINTS; ++p)
          store_pairs(Q + p * q_point + s * K + k, value[0][p], value[1][p]);
      }
    }
  };
  // Σ over these pairs of one point's outer products, for PANEL inputs.
  const auto sum = [&](std::int64_t part, std::int64_t pairs, std::int64_t p, std::int64_t c,
                       bool add) {
    multiply(K, {data(left, part) + p * q_point, 1, K}, {data(right, part) + p * v_point + c, C},
             pairs, {totals.data_ptr<float>() + (part * POINTS + p) * sums + c, C}, add);
  };

  if (apart)
    share(blocks, parts, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
      for (std::int64_t block = begin; block < end; ++block) {
        const std::int64_t first = block * size;
        const std::int64_t pairs = divide(std::min(size, seen.count - first), 2);
        transform(part, first, 0, pairs);
        for (int p = 0; p < POINTS; ++p)
          for (std::int64_t c = 0; c < C; c += PANEL) sum(part, pairs, p, c, block > begin);
      }
    });
  else
    for (std::int64_t first = 0; first < seen.count; first += size) {
      const std::int64_t pairs = divide(std::min(size, seen.count - first), 2), panels = C / PANEL;
      at::parallel_for(0, pairs, 8, [&](std::int64_t from, std::int64_t until) {
        transform(0, first, from, until);
      });
      at::parallel_for(0, POINTS * panels, 1, [&](std::int64_t from, std::int64_t until) {
        for (std::int64_t i = from; i < until; ++i)
          sum(0, pairs, i / panels, i % panels * PANEL, first > 0);
      });
    }

  const auto found = at::empty({K, C, 3, 3}, totals.options(), at::MemoryFormat::ChannelsLast);
  at::parallel_for(0, K, 8, [&](std::int64_t from, std::int64_t until) {
    for (std::int64_t k = from; k < until; ++k)
      for (std::int64_t c = 0; c < C; c += 16) {
        Vector u[POINTS], w[9];
        for (int p = 0; p < POINTS; ++p) {
          const float* at = totals.data_ptr<float>() + p * sums + k * C + c;
          u[p] = _mm512_loadu_ps(at);
          for (std::int64_t part = 1; part < parts; ++part)
            u[p] += _mm512_loadu_ps(at + part * POINTS * sums);
        }
        to_weight(u, w);
        for (int e = 0; e < 9; ++e)
          _mm512_storeu_ps(found.data_ptr<float>() + (k * 9 + e) * C + c, w[e]);
      }
  });
  return found;
}

}  // namespace

TORCH_LIBRARY(idaa_winograd, library) {
  library.def("convolve(Tensor maps, Tensor weight, bool turned) -> Tensor");
  library.def("weight_gradient(Tensor maps, Tensor gradient) -> Tensor");
}

TORCH_LIBRARY_IMPL(idaa_winograd, CPU, library) {
  library.impl("convolve", convolve);
  library.impl("weight_gradient", weight_gradient);
}
