// A switch for tests, of the scratch that kernels.h declares.
#pragma once

namespace ffnet {

// Whether all scratch is handed out full of NaN from now on, at a price.
void poison_scratch(bool wanted);

}  // namespace ffnet
