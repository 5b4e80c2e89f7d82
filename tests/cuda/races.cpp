// Runs every kernel of the drivers included before it, without the n-th __syncthreads where n is given.
#include <cstdlib>

#include "driver.h"

int main(int argc, char** argv) {
  if (argc > 1) emulate::omitted = std::atoi(argv[1]);
  for (const auto run : races) run();
}
