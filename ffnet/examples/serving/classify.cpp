// Classifies a picture with a model that `ffnet export --format aoti` wrote; no Python runs.
//
//   classify MODEL.pt2 PICTURE.ppm [--library LIBRARY.so] [--threads N] [--runs N]
//
// The picture is a binary PPM of the model's size, as `ffnet.examples.serve_image` makes it of any other. A model with
// operators of ffnet_kernels needs their library, libffnet_kernels_cpu.so (on a GPU libffnet_kernels_cuda.so besides).
// Prints the five likeliest classes with their probabilities, and with --runs the latency of one picture.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

struct Options {
  std::string model, picture;
  std::vector<std::string> libraries;
  int threads = 0, runs = 0;
};

constexpr const char* kUsage = "usage: classify MODEL.pt2 PICTURE.ppm [--library LIBRARY.so] [--threads N] [--runs N]";

int positive(const std::string& name, const std::string& text) {
  size_t read = 0;
  int value = 0;
  try {
    value = std::stoi(text, &read);
  } catch (const std::exception&) {
  }
  if (value < 1 || read != text.size()) throw std::runtime_error(name + ": expected a number above 0, got " + text);
  return value;
}

Options parse(int argc, char** argv) {
  Options options;
  std::vector<std::string> files;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      files.push_back(word);
      continue;
    }
    if (i + 1 == argc) throw std::runtime_error(kUsage);
    const std::string value = argv[++i];
    if (word == "--library")
      options.libraries.push_back(value);
    else if (word == "--threads")
      options.threads = positive(word, value);
    else if (word == "--runs")
      options.runs = positive(word, value);
    else
      throw std::runtime_error(kUsage);
  }
  if (files.size() != 2) throw std::runtime_error(kUsage);
  options.model = files[0], options.picture = files[1];
  return options;
}

// Numbers in a model's metadata, such as "0.485 0.456 0.406".
std::vector<float> numbers(const std::unordered_map<std::string, std::string>& metadata, const std::string& key) {
  const auto found = metadata.find(key);
  if (found == metadata.end()) throw std::runtime_error("the model has no " + key + ": `ffnet export` writes it");
  std::istringstream words(found->second);
  std::vector<float> values;
  for (float value; words >> value;) values.push_back(value);
  return values;
}

// A binary PPM as [1, 3, height, width], normalised.
at::Tensor read(const std::string& path, int64_t height, int64_t width, const std::vector<float>& mean,
                const std::vector<float>& std) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t found_width = 0, found_height = 0, most = 0;
  file >> magic >> found_width >> found_height >> most;
  file.get();
  if (!file || magic != "P6" || most != 255) throw std::runtime_error(path + ": expected a binary PPM of 8 bits");
  if (found_height != height || found_width != width)
    throw std::runtime_error(path + ": expected " + std::to_string(width) + "x" + std::to_string(height) +
                             " pixels, got " + std::to_string(found_width) + "x" + std::to_string(found_height));
  at::Tensor bytes = at::empty({1, height, width, 3}, at::kByte);
  file.read(reinterpret_cast<char*>(bytes.data_ptr()), bytes.numel());
  if (file.gcount() != bytes.numel()) throw std::runtime_error(path + " ends too early");
  const auto channels = [](const std::vector<float>& values) { return at::tensor(values); };
  return ((bytes.to(at::kFloat) / 255 - channels(mean)) / channels(std)).permute({0, 3, 1, 2}).contiguous();
}

void print_latency(const std::vector<double>& sorted) {
  const auto at = [&](double share) { return sorted[static_cast<size_t>(share * (sorted.size() - 1))]; };
  std::printf("latency ms: median %.3f, p90 %.3f, of %zu runs\n", at(0.5), at(0.9), sorted.size());
}

void run(const Options& options) {
  for (const std::string& library : options.libraries)  // before the model, which looks its operators up
    if (!dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
  if (options.threads) at::set_num_threads(options.threads);
  if (!std::ifstream(options.model)) throw std::runtime_error("cannot read " + options.model);

  torch::inductor::AOTIModelPackageLoader model(options.model);
  const auto metadata = model.get_metadata();
  const auto size = numbers(metadata, "input_size");
  const bool is_cuda = metadata.at("AOTI_DEVICE_KEY") == "cuda";
  at::Tensor x = read(options.picture, static_cast<int64_t>(size.at(1)), static_cast<int64_t>(size.at(2)),
                      numbers(metadata, "mean"), numbers(metadata, "std"));
  if (is_cuda) x = x.to(at::kCUDA);
  const auto classify = [&] { return model.run({x})[0].to(at::kCPU); };

  const at::Tensor scores = classify();
  const auto [probabilities, classes] = scores[0].to(at::kFloat).softmax(0).topk(std::min<int64_t>(5, scores.size(1)));
  for (int64_t i = 0; i < classes.size(0); ++i)
    std::printf("%.6f class %lld\n", probabilities[i].item<float>(), static_cast<long long>(classes[i].item<int64_t>()));
  if (!options.runs) return;
  std::vector<double> times;
  for (int i = -options.runs / 5 - 1; i < options.runs; ++i) {  // the first ones are no measure
    const auto start = std::chrono::steady_clock::now();
    classify();
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    if (i >= 0) times.push_back(time.count());
  }
  std::sort(times.begin(), times.end());
  print_latency(times);
}

}  // namespace

int main(int argc, char** argv) {
  const c10::InferenceMode no_gradients;
  try {
    run(parse(argc, argv));
  } catch (const c10::Error& error) {
    std::cerr << "classify: " << error.what_without_backtrace() << "\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "classify: " << error.what() << "\n";
    return 2;
  }
}
