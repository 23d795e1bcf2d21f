// The GPU that the host execution pretends to be.
#pragma once

namespace ffnet::host {

struct Settings {
  int architecture = 90, multiprocessors = 2;
  int resident_blocks = 3;  // of any kernel, on a multiprocessor
};

inline Settings& settings() {
  static Settings settings;
  return settings;
}

}  // namespace ffnet::host
