// Targeted images from a file of tsynd.export_torchscript, without Python.
//
//     targeted synthesizer.pt images.f32 targeted.f32
//
// images.f32: raw float32 [N, C, H, W] in [0, 1], as numpy's tofile writes; so is targeted.f32.
#include <torch/script.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

// [C, H, W] from the file's metadata, whose "image_shape": [1, 28, 28] is JSON
std::vector<int64_t> image_shape(const std::string& metadata) {
  const std::string key = "\"image_shape\": [";
  const size_t begin = metadata.find(key);
  if (begin == std::string::npos) throw std::runtime_error("the model holds no tsynd metadata");
  std::vector<int64_t> shape;
  const char* at = metadata.c_str() + begin + key.size();
  for (char* end; shape.size() < 3; at = end + 1) shape.push_back(std::strtoll(at, &end, 10));
  return shape;
}

torch::Tensor read_images(const char* path, const std::vector<int64_t>& shape) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  const size_t image = shape[0] * shape[1] * shape[2] * sizeof(float);
  if (bytes.empty() || bytes.size() % image != 0)
    throw std::runtime_error(std::string(path) + " holds no whole number of images of the model's shape");
  torch::Tensor images = torch::empty({int64_t(bytes.size() / image), shape[0], shape[1], shape[2]});
  std::copy(bytes.begin(), bytes.end(), static_cast<char*>(images.data_ptr()));
  return images;
}

void run(const char* model_path, const char* in, const char* out) {
  std::unordered_map<std::string, std::string> extra{{"metadata.json", ""}};
  torch::jit::Module model = torch::jit::load(model_path, torch::kCPU, extra);
  const torch::Tensor images = read_images(in, image_shape(extra["metadata.json"]));

  const torch::NoGradGuard no_grad;  // the derivatives are in the file
  const auto results = model.forward({images}).toTuple()->elements();
  const torch::Tensor targeted = results[0].toTensor().contiguous();
  const double before = results[2].toTensor().mean().item<double>();
  const double after = results[3].toTensor().mean().item<double>();
  std::printf("%lld images, mean uncertainty %.4f -> %.4f nats\n", static_cast<long long>(targeted.size(0)),
              before, after);
  std::ofstream(out, std::ios::binary)
      .write(static_cast<const char*>(targeted.data_ptr()), std::streamsize(targeted.nbytes()));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: targeted synthesizer.pt images.f32 targeted.f32\n");
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "targeted: %s\n", error.what());
    return 1;
  }
}
