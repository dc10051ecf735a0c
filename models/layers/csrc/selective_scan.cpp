// Mamba-1 selective scan on the CPU, forward and backward, fused and without storing any [B, L, E, N] tensor.
//
//   h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,      y_t = sum_n C_t h_t + D u_t
//
// Letters: B batch, L length, E channels, N state. Tensors are contiguous float32: u, delta, y [B, L, E];
// A [E, N]; B, C [B, L, N]; D [E]. Channels are the SIMD lanes, the state lives in registers, time is the inner loop.
// The forward keeps the state at the start of every chunk; the backward recomputes the states of one chunk at a time.
// Source: Gu and Dao 2023, arXiv 2312.00752, algorithm 2 and appendix D (recomputation).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

constexpr int kLanes = 16;     // channels a block; one AVX-512 or two AVX2 registers
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr int64_t kItems = 16; // of work in the backward pass
constexpr int64_t kChunk = 32; // time steps whose states the backward keeps; 64 KiB of scratch at N = 16

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

constexpr int kSums = 4; // a sum over the states is taken in so many parts: one alone waits for itself

inline Vec total(const Vec* parts) { return (parts[0] + parts[1]) + (parts[2] + parts[3]); }

inline Vec splat(float x) { return Vec{} + x; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

// Halves onto halves; a loop over the lanes has to stay a chain of scalars.
inline float sum(Vec v) {
  typedef float Eight __attribute__((vector_size(32)));
  typedef float Four __attribute__((vector_size(16)));
  Eight eight[2];
  std::memcpy(eight, &v, sizeof(v));
  eight[0] += eight[1];
  Four four[2];
  std::memcpy(four, eight, sizeof(four));
  four[0] += four[1];
  return (four[0][0] + four[0][2]) + (four[0][1] + four[0][3]);
}

// 2^x for x <= 0, relative error below 2e-7: a polynomial on |r| <= 1/2, fitted for this, and the exponent added to its
// bits. The forward pass takes 4.2 ms with it and 6.0 with Cephes' exp (batch 8, L 512, E 512, N 16, one thread).
inline Vec exp2_neg(Vec x) {
  const Vec low = splat(-125.f);
  x = x < low ? low : x;
  const Vec magic = splat(12582912.f); // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = x + magic, r = x - (n - magic);
  Vec p = splat(1.3264726391e-3f);
  p = p * r + 9.6715126973e-3f;
  p = p * r + 5.5507337459e-2f;
  p = p * r + 2.4022242084e-1f;
  p = p * r + 6.9314697760e-1f;
  p = p * r + 1.f;
  IVec exponent, bits;
  std::memcpy(&exponent, &n, sizeof(exponent));
  std::memcpy(&bits, &p, sizeof(bits));
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof(p));
  return p;
}

struct Shape {
  int64_t B, L, E, N, chunks, blocks, padded; // padded = E rounded up to whole blocks
};

Shape shape_of(const at::Tensor& u, const at::Tensor& A) {
  Shape s{u.size(0), u.size(1), u.size(2), A.size(1), 0, 0, 0};
  s.chunks = (s.L + kChunk - 1) / kChunk;
  s.blocks = (s.E + kLanes - 1) / kLanes;
  s.padded = s.blocks * kLanes;
  return s;
}

// Rows of channels whose last block is not full are read and written through a padded buffer.
inline Vec load_row(const float* row, int64_t e, int64_t E) {
  if (e + kLanes <= E) return load(row + e);
  Vec v{};
  std::memcpy(&v, row + e, (E - e) * sizeof(float));
  return v;
}

inline void store_row(float* row, int64_t e, int64_t E, Vec v) {
  if (e + kLanes <= E) return store(row + e, v);
  std::memcpy(row + e, &v, (E - e) * sizeof(float));
}

// A [E, N] -> [blocks, N, lanes], for the power of two
std::vector<Vec> lanes_of(const float* A, const Shape& s) {
  std::vector<Vec> out(s.blocks * s.N); // of vectors, so that none lies across two cache lines
  for (int64_t e = 0; e < s.E; ++e)
    for (int64_t n = 0; n < s.N; ++n) out[e / kLanes * s.N + n][e % kLanes] = A[e * s.N + n] * kLog2E;
  return out;
}

inline int64_t at_time(int64_t step, int64_t L, bool reverse) { return reverse ? L - 1 - step : step; }

template <int kN>
void forward_block(const Shape& s, bool reverse, int64_t b, int64_t block, const float* u, const float* delta,
                   const Vec* lanes_A, const float* Bm, const float* C, const float* D, float* y, float* starts) {
  const int64_t N = kN > 0 ? kN : s.N, e = block * kLanes;
  Vec h[kN > 0 ? kN : 256] = {};
  const Vec* A = lanes_A + block * N;
  const Vec d_skip = load_row(D, e, s.E);
  for (int64_t step = 0; step < s.L; ++step) {
    if (step % kChunk == 0) {
      float* start = starts + (((b * s.chunks + step / kChunk) * s.blocks + block) * N) * kLanes;
      for (int64_t n = 0; n < N; ++n) store(start + n * kLanes, h[n]);
    }
    const int64_t row = b * s.L + at_time(step, s.L, reverse);
    const Vec ut = load_row(u + row * s.E, e, s.E), dt = load_row(delta + row * s.E, e, s.E), x = ut * dt;
    const float *bt = Bm + row * N, *ct = C + row * N;
    Vec acc[kSums] = {ut * d_skip};
#pragma GCC unroll 16
    for (int64_t n = 0; n < N; ++n) {
      h[n] = exp2_neg(dt * A[n]) * h[n] + x * bt[n];
      acc[n % kSums] += h[n] * ct[n];
    }
    store_row(y + row * s.E, e, s.E, total(acc));
  }
}

struct Grads {
  float *u, *delta, *A, *B, *C, *D;
};

// One chunk of one block: recompute its states, then walk back through it.
template <int kN>
void backward_chunk(const Shape& s, bool reverse, int64_t b, int64_t block, int64_t chunk, const float* u,
                    const float* delta, const Vec* lanes_A, const float* Bm, const float* C, const float* D,
                    const float* starts, const float* dy, Vec* gh, Vec* gA, Vec& gD, Vec* decay, Vec* state, Vec* gB,
                    Vec* gC, const Grads& g) {
  const int64_t N = kN > 0 ? kN : s.N, e = block * kLanes;
  const int64_t first = chunk * kChunk, steps = std::min(kChunk, s.L - first);
  const Vec* A = lanes_A + block * N;
  const float* start = starts + (((b * s.chunks + chunk) * s.blocks + block) * N) * kLanes;
  for (int64_t n = 0; n < N; ++n) state[n] = load(start + n * kLanes);
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t row = b * s.L + at_time(first + i, s.L, reverse);
    const Vec dt = load_row(delta + row * s.E, e, s.E), x = dt * load_row(u + row * s.E, e, s.E);
    const Vec dyt = load_row(dy + row * s.E, e, s.E);
    const float* bt = Bm + row * N;
#pragma GCC unroll 16
    for (int64_t n = 0; n < N; ++n) {
      const Vec a = exp2_neg(dt * A[n]), h = a * state[i * N + n] + x * bt[n];
      decay[i * N + n] = a;
      state[(i + 1) * N + n] = h;
      gC[i * N + n] += dyt * h;
    }
  }
  const Vec d_skip = load_row(D, e, s.E);
  for (int64_t i = steps - 1; i >= 0; --i) {
    const int64_t row = b * s.L + at_time(first + i, s.L, reverse);
    const Vec ut = load_row(u + row * s.E, e, s.E), dt = load_row(delta + row * s.E, e, s.E);
    const Vec dyt = load_row(dy + row * s.E, e, s.E), x = ut * dt;
    const float *bt = Bm + row * N, *ct = C + row * N;
    Vec gx[kSums] = {}, gdt[kSums] = {};
#pragma GCC unroll 16
    for (int64_t n = 0; n < N; ++n) {
      const Vec through = gh[n] + dyt * ct[n];
      gB[i * N + n] += through * x;
      gx[n % kSums] += through * bt[n];
      const Vec carried = through * decay[i * N + n], power = carried * state[i * N + n];
      gdt[n % kSums] += power * A[n];
      gA[n] += power * dt;
      gh[n] = carried;
    }
    gD += dyt * ut;
    const Vec dx = total(gx);
    store_row(g.u + row * s.E, e, s.E, dx * dt + dyt * d_skip);
    store_row(g.delta + row * s.E, e, s.E, total(gdt) * kLn2 + dx * ut);
  }
}

template <typename Run>
void with_state(int64_t N, Run run) {
  switch (N) {
    case 4: run(std::integral_constant<int, 4>{}); break;
    case 8: run(std::integral_constant<int, 8>{}); break;
    case 16: run(std::integral_constant<int, 16>{}); break;
    default: run(std::integral_constant<int, 0>{});
  }
}

// The loops trust shapes and layout: what does not fit would be read beyond its end. Types are checked on access.
void check(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& Bm,
           const at::Tensor& C, const at::Tensor& D) {
  TORCH_CHECK(u.dim() == 3 && A.dim() == 2, "selective_scan: u is ", u.sizes(), " and A ", A.sizes());
  const int64_t E = u.size(2), N = A.size(1);
  const bool fits = A.size(0) == E && delta.sizes() == u.sizes() && Bm.sizes() == C.sizes() && Bm.dim() == 3 &&
                    Bm.size(0) == u.size(0) && Bm.size(1) == u.size(1) && Bm.size(2) == N && D.dim() == 1 &&
                    D.size(0) == E;
  TORCH_CHECK(fits, "selective_scan: shapes do not fit: u ", u.sizes(), ", delta ", delta.sizes(), ", A ", A.sizes(),
              ", B ", Bm.sizes(), ", C ", C.sizes(), ", D ", D.sizes());
  TORCH_CHECK(N <= 256, "selective_scan: state size ", N, " is above 256");
  for (const at::Tensor* x : {&u, &delta, &A, &Bm, &C, &D})
    TORCH_CHECK(x->is_contiguous() && x->device().is_cpu(), "selective_scan: a tensor is not contiguous on the CPU");
}

std::tuple<at::Tensor, at::Tensor> scan_forward(const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A,
                                                const at::Tensor& Bm, const at::Tensor& C, const at::Tensor& D,
                                                bool reverse) {
  check(u, delta, A, Bm, C, D);
  const Shape s = shape_of(u, A);
  at::Tensor y = at::empty(u.sizes(), u.options());
  at::Tensor starts = at::empty({s.B, s.chunks, s.blocks, s.N, kLanes}, u.options());
  const std::vector<Vec> lanes_A = lanes_of(A.const_data_ptr<float>(), s);
  const float *pu = u.const_data_ptr<float>(), *pd = delta.const_data_ptr<float>(), *pB = Bm.const_data_ptr<float>(),
              *pC = C.const_data_ptr<float>(), *pD = D.const_data_ptr<float>();
  float *py = y.mutable_data_ptr<float>(), *ps = starts.mutable_data_ptr<float>();
  with_state(s.N, [&](auto state) {
    at::parallel_for(0, s.B * s.blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        forward_block<decltype(state)::value>(s, reverse, i / s.blocks, i % s.blocks, pu, pd, lanes_A.data(), pB, pC,
                                              pD, py, ps);
    });
  });
  return {y, starts};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> scan_backward(
    const at::Tensor& dy, const at::Tensor& u, const at::Tensor& delta, const at::Tensor& A, const at::Tensor& Bm,
    const at::Tensor& C, const at::Tensor& D, const at::Tensor& starts, bool reverse) {
  check(u, delta, A, Bm, C, D);
  const Shape s = shape_of(u, A);
  TORCH_CHECK(dy.sizes() == u.sizes() && dy.is_contiguous(), "selective_scan: the gradient is ", dy.sizes());
  TORCH_CHECK(starts.numel() == s.B * s.chunks * s.padded * s.N && starts.is_contiguous(),
              "selective_scan: the states are ", starts.sizes());
  at::Tensor du = at::empty(u.sizes(), u.options()), ddelta = at::empty(u.sizes(), u.options());
  // An item is one sequence and a share of the channel blocks: at least kItems of them keep many threads busy when the
  // batch is small. Not the number of threads but the shapes decide, or else sums would depend on the machine.
  const int64_t shares = std::min(s.blocks, (kItems + s.B - 1) / std::max<int64_t>(1, s.B));
  at::Tensor dB = at::zeros({shares, s.B, s.L, s.N}, u.options()), dC = at::zeros({shares, s.B, s.L, s.N}, u.options());
  at::Tensor dA = at::empty({s.B, s.blocks, s.N, kLanes}, u.options()), dD = at::empty({s.B, s.padded}, u.options());
  const std::vector<Vec> lanes_A = lanes_of(A.const_data_ptr<float>(), s);
  const float *pu = u.const_data_ptr<float>(), *pd = delta.const_data_ptr<float>(), *pB = Bm.const_data_ptr<float>(),
              *pC = C.const_data_ptr<float>(), *pD = D.const_data_ptr<float>(), *ps = starts.const_data_ptr<float>(),
              *pdy = dy.const_data_ptr<float>();
  const Grads g{du.mutable_data_ptr<float>(), ddelta.mutable_data_ptr<float>(), dA.mutable_data_ptr<float>(),
                dB.mutable_data_ptr<float>(), dC.mutable_data_ptr<float>(),     dD.mutable_data_ptr<float>()};
  with_state(s.N, [&](auto state_size) {
    constexpr int kN = decltype(state_size)::value;
    at::parallel_for(0, s.B * shares, 1, [&](int64_t begin, int64_t end) {
      const int64_t N = s.N;
      std::vector<Vec> decay(kChunk * N), state((kChunk + 1) * N), gB(kChunk * N), gC(kChunk * N);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / shares, share = item % shares;
        const int64_t lo = share * s.blocks / shares, hi = (share + 1) * s.blocks / shares;
        std::vector<Vec> gh((hi - lo) * N), gA((hi - lo) * N), gD(hi - lo);
        for (int64_t chunk = s.chunks - 1; chunk >= 0; --chunk) {
          std::fill(gB.begin(), gB.end(), Vec{});
          std::fill(gC.begin(), gC.end(), Vec{});
          for (int64_t block = lo; block < hi; ++block)
            backward_chunk<kN>(s, reverse, b, block, chunk, pu, pd, lanes_A.data(), pB, pC, pD, ps, pdy,
                               &gh[(block - lo) * N], &gA[(block - lo) * N], gD[block - lo], decay.data(),
                               state.data(), gB.data(), gC.data(), g);
          const int64_t first = chunk * kChunk, steps = std::min(kChunk, s.L - first);
          for (int64_t i = 0; i < steps; ++i) {
            const int64_t row = ((share * s.B + b) * s.L + at_time(first + i, s.L, reverse)) * N;
            for (int64_t n = 0; n < N; ++n) {
              g.B[row + n] = sum(gB[i * N + n]);
              g.C[row + n] = sum(gC[i * N + n]);
            }
          }
        }
        for (int64_t block = lo; block < hi; ++block) {
          for (int64_t n = 0; n < N; ++n) store(g.A + ((b * s.blocks + block) * N + n) * kLanes, gA[(block - lo) * N + n]);
          store(g.D + b * s.padded + block * kLanes, gD[block - lo]);
        }
      }
    });
  });
  at::Tensor dA_EN = dA.sum(0).permute({0, 2, 1}).reshape({s.padded, s.N}).narrow(0, 0, s.E).contiguous();
  return {du, ddelta, dA_EN, dB.sum(0), dC.sum(0), dD.sum(0).narrow(0, 0, s.E).contiguous()};
}

} // namespace

TORCH_LIBRARY(rna_scan, m) {
  m.def("forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, bool reverse) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor dy, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor starts, "
      "bool reverse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rna_scan, CPU, m) {
  m.impl("forward", &scan_forward);
  m.impl("backward", &scan_backward);
}
