// What the programs that Python calls have in common.
#pragma once

#include <cstdio>

#include "memory.h"

namespace emulator {

// What the emulator says of a run; empty where it found nothing. Read before the next call.
template <class Run>
const char* guarded(Run run) {
  static std::string said;
  said.clear();
  try {
    run();
  } catch (const Error& error) {
    said = error.what();
  }
  return said.c_str();
}

}  // namespace emulator

// Names of the kernels that were launched since the last call, between spaces.
extern "C" __attribute__((used, visibility("default"))) inline const char* launched_kernels() {
  static std::string names;
  names.clear();
  for (const std::string& name : emulator::launched) names += (names.empty() ? "" : " ") + name;
  emulator::launched.clear();
  return names.c_str();
}
