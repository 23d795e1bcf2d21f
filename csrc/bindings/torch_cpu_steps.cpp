// Steps of a program in a row as one operator: what lies between two is a call in C++ instead of one through Python.
// ffnet_kernels/steps.py writes the numbers; for each step
//
//   its operator, its arguments in the order of the schema, how many values nobody reads any more, and which.
//
// A tensor is the number of a value, or -1 for none: first come those that were given, then the steps' results. Lists
// and strings begin with their length. A float is its bits.
#include <cstring>
#include <tuple>
#include <type_traits>

#include "operator_schemas.h"
#include "torch_cpu.h"

namespace ffnet::cpu_operators {
namespace {

class Reader {
 public:
  Reader(const Numbers& numbers, std::vector<Optional> values) : numbers_(numbers), values_(std::move(values)) {}

  bool ends() const { return at_ == numbers_.size(); }
  void add(Tensor result) { values_.emplace_back(std::move(result)); }
  const Tensor& last() const { return known(static_cast<int64_t>(values_.size()) - 1); }
  void let_go() {
    for (int64_t count = length(); count > 0; --count) {
      const int64_t value = next();
      known(value);
      values_[value].reset();
    }
  }

  int64_t next() {
    STD_TORCH_CHECK(!ends(), "ffnet_kernels (cpu): steps end within a step");
    return numbers_[at_++];
  }

  template <class T>
  T read() {
    if constexpr (std::is_same_v<T, Tensor>) {
      return known(next());
    } else if constexpr (std::is_same_v<T, Optional>) {
      const int64_t value = next();
      return value < 0 ? Optional() : Optional(known(value));
    } else if constexpr (std::is_same_v<T, double>) {
      const int64_t bits = next();
      double value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    } else {  // a list or a string
      const int64_t count = length();
      const auto first = numbers_.begin() + static_cast<std::ptrdiff_t>(at_);
      at_ += count;
      if constexpr (std::is_same_v<T, std::string>) {  // which messages repeat
        for (auto c = first; c != first + count; ++c)
          STD_TORCH_CHECK(*c > 0 && *c < 128, "ffnet_kernels (cpu): a string of a step has character ", *c);
      }
      return T(first, first + count);
    }
  }

 private:
  int64_t length() {
    const int64_t count = next();
    STD_TORCH_CHECK(count >= 0 && count <= static_cast<int64_t>(numbers_.size() - at_),
                    "ffnet_kernels (cpu): a list of a step has ", count, " elements");
    return count;
  }
  const Tensor& known(int64_t value) const {
    STD_TORCH_CHECK(value >= 0 && value < static_cast<int64_t>(values_.size()) && values_[value].has_value(),
                    "ffnet_kernels (cpu): a step reads value ", value, ", which is not there");
    return *values_[value];
  }

  const Numbers& numbers_;
  size_t at_ = 0;
  std::vector<Optional> values_;
};

template <class... Arguments>
Tensor run(Tensor (*operation)(Arguments...), Reader& reader) {
  // In braces, so that they are read in order.
  const std::tuple<std::decay_t<Arguments>...> arguments{reader.read<std::decay_t<Arguments>>()...};
  return std::apply(operation, arguments);
}

#define FFNET_STEP(name) [](Reader& reader) { return run(name, reader); },
constexpr Tensor (*kSteps[])(Reader&) = {FFNET_KERNELS_STEPS(FFNET_STEP)};
#undef FFNET_STEP

Tensor steps(const std::vector<Tensor>& values, const Numbers& numbers) {
  Reader reader(numbers, {values.begin(), values.end()});
  STD_TORCH_CHECK(!reader.ends(), "ffnet_kernels (cpu): expected steps");
  while (!reader.ends()) {
    const int64_t step = reader.next();
    STD_TORCH_CHECK(step >= 0 && step < static_cast<int64_t>(std::size(kSteps)),
                    "ffnet_kernels (cpu): there is no step ", step);
    reader.add(kSteps[step](reader));
    reader.let_go();
  }
  return reader.last();
}

}  // namespace
}  // namespace ffnet::cpu_operators

STABLE_TORCH_LIBRARY_IMPL(ffnet_kernels, CPU, m) { m.impl("steps", TORCH_BOX(&ffnet::cpu_operators::steps)); }
