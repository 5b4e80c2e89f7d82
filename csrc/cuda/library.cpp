// The fact of this library that Python asks for when it loads it.
#include <torch/csrc/stable/library.h>

#include <cstdint>

namespace {
int64_t schema_hash() { return IMBDIFF_SCHEMA_HASH; }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(imbdiff, CompositeExplicitAutograd, m) { m.impl("schema_hash_cuda", TORCH_BOX(&schema_hash)); }
