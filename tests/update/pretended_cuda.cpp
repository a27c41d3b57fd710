// The part of CUDA's runtime that launches, for machines without a GPU: it counts, and fails when
// told to. Preloaded, it stands before the real one.

struct Dim3 {
  unsigned x, y, z;
};

namespace {
int last = 0;      // the error that cudaGetLastError returns
int failing = 0;   // the launch that fails; 0: none
int launches = 0;  // since `pretend`
}  // namespace

extern "C" {

void pretend(int left_behind, int fails) {
  last = left_behind;
  failing = fails;
  launches = 0;
}

int launched() { return launches; }

int cudaLaunchKernel(const void*, Dim3, Dim3, void**, unsigned long, void*) {
  constexpr int kLaunchOutOfResources = 701;
  if (++launches != failing) return 0;
  return last = kLaunchOutOfResources;
}

int cudaGetLastError() {
  const int error = last;
  last = 0;
  return error;
}
}
