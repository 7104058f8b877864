// Philox, the byte thresholds and the row arithmetic as every CPU runs them, against known answers and double
// precision.
#include "../../csrc/cuda/mask_bits.cuh"
#include "reference.h"

namespace {

using namespace tsynd;

void philox_known_answers() {
  struct Known {
    uint32_t word;
    int rounds;
    uint32_t out[4];
  };
  const Known known[] = {{0u, 10, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
                         {~0u, 10, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
                         {0u, 7, {0x5f6fb709, 0x0d893f64, 0x4f121f81, 0x4f730a48}},
                         {~0u, 7, {0x5207ddc2, 0x45165e59, 0x4d8ee751, 0x8c52f662}}};
  for (const Known& k : known) {
    const Philox4 out = philox4x32(Philox4{{k.word, k.word, k.word, k.word}}, k.word, k.word, k.rounds);
    for (int i = 0; i < 4; ++i) check::expect(out.w[i] == k.out[i], "philox word " + std::to_string(i));
  }
}

void thresholds() {
  for (uint32_t keep = 1; keep <= 256; ++keep)
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t word =
          byte | (255 - byte) << 8 | ((byte + 77) & 255) << 16 | ((byte * 5 + 1) & 255) << 24;
      const uint32_t signs = kept_signs(word, keep_test(keep));
      for (int i = 0; i < 4; ++i)
        check::expect(kept(signs, i) == (((word >> (8 * i)) & 255) < keep),
                      "threshold " + std::to_string(keep) + " of byte " + std::to_string(byte));
    }
  // whole blocks: the same bits as the CPU kernels' mask_block
  const MaskAddress at = mask_address(-12345678901234ll, 7, 0xFFFFFFFFll);
  for (const uint32_t keep : {1u, 127u, 128u, 200u, 256u}) {
    const MaskStream stream{at.key0, at.key1, at.layer, keep_test(keep)};
    for (uint32_t block = 0; block < 50; ++block) {
      const KeptSigns signs = kept_block(stream, block, 3, at.sample);
      uint32_t bits = 0;
      for (int u = 0; u < 16; ++u) bits |= static_cast<uint32_t>(kept(signs.w[u / 4], u % 4)) << u;
      check::expect(bits == mask_block(at, block, 3, keep), "mask block");
    }
  }
}

struct Rows {
  float* data;
  float in(int64_t i) const { return data[i]; }
  float get(int64_t i) const { return data[i]; }
  void put(int64_t i, float x) { data[i] = x; }
};

void row_arithmetic() {
  check::Random random(1);
  for (const int samples : {1, 2, 7, 32})
    for (const int classes : {1, 2, 3, 8, 33})
      for (const bool entropy : {false, true})
        for (const bool multilabel : {false, true}) {
          const int count = samples * classes;
          std::vector<float> logits(count), p(count), q(2 * classes);
          for (float& x : logits) x = static_cast<float>(random.normal(3.));
          const std::vector<double> wide(logits.begin(), logits.end());
          Rows rows{logits.data()};
          const Objective objective = entropy ? Objective::kEntropy : Objective::kMutualInformation;
          const float value = multilabel ? multilabel_uncertainty<Math<float>>(rows, p.data(), q.data(),
                                                                               samples, classes, objective)
                                         : multiclass_uncertainty<Math<float>>(rows, p.data(), q.data(),
                                                                               samples, classes, objective);
          const check::Row exact = check::uncertainty(wide, samples, classes, entropy, multilabel);
          const std::string what = "row " + std::to_string(samples) + " x " + std::to_string(classes);
          check::expect_close(std::vector<float>{value}, {exact.value}, 1e-5, 2e-7, what + " value");
          check::expect_close(logits, exact.gradient, 1e-5, 2e-7, what + " gradient");
        }
}

void scratch_is_bounded() {
  for (const int64_t images : {1ll, 1000ll, 1ll << 40})
    for (const int64_t each : {1ll, 256ll, 1ll << 20, 1ll << 30}) {
      const int64_t at_once = images_at_once(images, each);
      check::expect(at_once >= 1 && at_once <= images && (at_once == 1 || at_once * each <= kMostScratch),
                    "images at once");
    }
}

}  // namespace

int main() {
  philox_known_answers();
  thresholds();
  row_arithmetic();
  scratch_is_bounded();
  std::printf("%d checks, %d failed\n", check::checks, check::failures);
  return check::failures != 0;
}
