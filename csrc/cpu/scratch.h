// A switch, for tests, of the scratch memory declared in kernels.h.
#pragma once

namespace ffnet {

// Whether all scratch is filled with NaN from now on, which takes time.
void poison_scratch(bool wanted);

}  // namespace ffnet
