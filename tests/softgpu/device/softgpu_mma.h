// Tensor core and asynchronous copy instructions, with the fragment layouts of the PTX manual (section "Matrix
// Multiply-Accumulate Instructions"), and conversions of the number formats they take.
#pragma once

namespace softgpu {
inline uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
inline float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
// f32 -> bf16, round to nearest even; NaN becomes 0x7fff as with cvt.rn.bf16.f32.
inline uint16_t bf16_rn(float f) {
  uint32_t u = bits_of(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
inline float bf2f(uint16_t h) { return float_of((uint32_t)h << 16); }
// f32 -> f16, round to nearest even, overflow to infinity.
inline uint16_t f16_rn(float f) {
  const uint16_t sign = (uint16_t)((bits_of(f) >> 16) & 0x8000u);
  const float a = fabsf(f);
  if (a != a) return 0x7fff;
  if (a >= 65520.0f) return sign | 0x7c00;
  if (a < 6.103515625e-05f) return sign | (uint16_t)nearbyintf(a * 16777216.0f);  // subnormal: units of 2^-24
  const uint32_t u = bits_of(a), r = u + 0xfff + ((u >> 13) & 1);
  return sign | (uint16_t)((((r >> 23) - 112) << 10) | ((r >> 13) & 0x3ff));
}
inline float f16_to_f(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 0x3ff;
  if (e == 0) return float_of(sign | bits_of((float)m * 5.9604644775390625e-08f));
  if (e == 31) return float_of(sign | 0x7f800000u | (m << 13));
  return float_of(sign | ((e + 112) << 23) | (m << 13));
}
// FP8 E4M3 (OCP: no infinity, 0x7f is NaN, largest 448), round to nearest even, saturating as cvt.rn.satfinite.
inline uint8_t e4m3_rn(float f) {
  const uint8_t sign = (uint8_t)((bits_of(f) >> 24) & 0x80u);
  const float a = fabsf(f);
  if (a != a) return 0x7f;
  if (a >= 448.0f) return sign | 0x7e;
  if (a < 0.015625f) return sign | (uint8_t)nearbyintf(a * 512.0f);  // subnormal: units of 2^-9
  const uint32_t u = bits_of(a), r = u + 0x7ffff + ((u >> 20) & 1);
  return sign | (uint8_t)((((r >> 23) - 120) << 3) | ((r >> 20) & 7));
}
inline float e4m3_to_f(uint8_t b) {
  const int e = (b >> 3) & 15, m = b & 7;
  float v = e == 0 ? (float)m / 512.0f : float_of((uint32_t)((e + 120) << 23) | ((uint32_t)m << 20));
  if ((b & 0x7f) == 0x7f) v = float_of(0x7fffffffu);
  return b & 0x80 ? -v : v;
}

struct Fragments { uint32_t a[4], b[2]; };
typedef float Float8 __attribute__((vector_size(32)));
// The product of the fragments that all lanes have posted. Once for the warp and not by each lane for itself: forward
// passes spend most of their time here.
template <class Widen> inline void multiply(Table& table, Widen widen) {
  float a[16][16];
  alignas(32) float b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const Fragments f = peek<Fragments>(table, lane);
    const int g = lane >> 2, t = lane & 3;
    for (int i = 0; i < 4; i++) {
      float* pair = &a[g + 8 * (i & 1)][2 * t + 8 * (i >> 1)];
      pair[0] = widen((uint16_t)f.a[i]), pair[1] = widen((uint16_t)(f.a[i] >> 16));
    }
    for (int i = 0; i < 2; i++) {
      const int k = 2 * t + 8 * i;
      b[k][g] = widen((uint16_t)f.b[i]), b[k + 1][g] = widen((uint16_t)(f.b[i] >> 16));
    }
  }
  Float8 rows[16];
  memcpy(rows, b, sizeof(rows));
  for (int m = 0; m < 16; m++) {
    Float8 sum{};
    for (int k = 0; k < 16; k++) sum += a[m][k] * rows[k];
    memcpy(table.product[m], &sum, sizeof(sum));
  }
}
// D(16x8) += A(16x16, row) B(16x8, column). Lane 4g+t holds of A the rows g, g+8 and of B the column g, each at the k
// columns 2t, 2t+1, 2t+8, 2t+9; of D the rows g, g+8 at the columns 2t, 2t+1.
template <class Widen>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Widen widen) {
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Table& table = exchange(0xffffffffu, mine, "mma.sync", [&](Table& all) { multiply(all, widen); });
  const int lane = self()->lane, g = lane >> 2, t = lane & 3;
  d[0] += table.product[g][2 * t];
  d[1] += table.product[g][2 * t + 1];
  d[2] += table.product[g + 8][2 * t];
  d[3] += table.product[g + 8][2 * t + 1];
}
__attribute__((noinline)) inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                        const uint32_t (&b)[2]) {
  mma_m16n8k16(d, a, b, bf2f);
}
__attribute__((noinline)) inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4],
                                                       const uint32_t (&b)[2]) {
  mma_m16n8k16(d, a, b, f16_to_f);
}

struct Row16 { uint16_t e[8]; };
// Lanes 8j..8j+7 give the rows of matrix j; every lane takes two neighbours of one row (or, transposed, of one column).
template <int N> inline void ldmatrix(uint32_t (&r)[N], const void* row, bool transposed) {
  Row16 mine{};
  if (self()->lane < N * 8) {
    if ((uintptr_t)row & 15) fail("ldmatrix: row address not 16-byte aligned");
    memcpy(&mine, row, 16);
  }
  const Table& table = exchange(0xffffffffu, mine, "ldmatrix");
  const int lane = self()->lane, major = lane >> 2, minor = (lane & 3) * 2;
  for (int j = 0; j < N; j++) {
    const int lo_row = j * 8 + (transposed ? minor : major), hi_row = transposed ? lo_row + 1 : lo_row;
    const uint16_t lo = peek<Row16>(table, lo_row).e[transposed ? major : minor];
    const uint16_t hi = peek<Row16>(table, hi_row).e[transposed ? major : minor + 1];
    r[j] = (uint32_t)lo | (uint32_t)hi << 16;
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix<4>(r, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ldmatrix<4>(r, row, true); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { ldmatrix<2>(r, row, false); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { ldmatrix<2>(r, row, true); }

// cp.async copies when it is waited for and not before, so that a missing wait shows as wrong data.
inline void cp_async(void* smem, const void* gmem, uint32_t size, bool ok) {
  if (((uintptr_t)smem | (ok ? (uintptr_t)gmem : 0)) & (size - 1)) fail("cp.async: address not aligned to its size");
  Fiber* f = self();
  if (f->copies == f->copy_room) {
    f->copy_room = f->copy_room ? f->copy_room * 2 : 16;
    f->copy = (AsyncCopy*)realloc(f->copy, f->copy_room * sizeof(AsyncCopy));
  }
  f->copy[f->copies++] = AsyncCopy{smem, gmem, ok ? size : 0, size, f->copy_group};
}
inline void cp_async16(void* smem, const void* gmem, bool ok) { cp_async(smem, gmem, 16, ok); }
inline void cp_async8(void* smem, const void* gmem, bool ok) { cp_async(smem, gmem, 8, ok); }
inline void cp_async4(void* smem, const void* gmem, bool ok) { cp_async(smem, gmem, 4, ok); }
inline void cp_commit() { self()->copy_group++; }
// Completes all groups of this thread but the newest n.
inline void cp_wait(int n) {
  Fiber* f = self();
  uint32_t k = 0;
  for (; k < f->copies && (int)(f->copy_group - f->copy[k].group) > n; k++) {
    const AsyncCopy& c = f->copy[k];
    memcpy(c.dst, c.src, c.bytes);
    memset((char*)c.dst + c.bytes, 0, c.fill - c.bytes);
  }
  memmove(f->copy, f->copy + k, (f->copies - k) * sizeof(AsyncCopy));
  f->copies -= k;
}
}  // namespace softgpu
