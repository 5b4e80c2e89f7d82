// Runs every kernel of one of the drivers included before it, without the n-th __syncthreads: races DRIVER N.
#include <cstdlib>

#include "driver.h"

int main(int argc, char** argv) {
  if (argc > 2) emulate::omitted = std::atoi(argv[2]);
  if (argc > 1) races.at(std::atoi(argv[1]))();
}
