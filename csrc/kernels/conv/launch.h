// Between the convolution's launcher (conv.cu) and its instances, one file per layout.
#pragma once

#include "params/conv.h"

namespace lsm::conv {

// Of either layout: workspace of a call, and the call.
int64_t workspace_channel_last(ConvParams const& p, bool backward);
int64_t workspace_channel_first(ConvParams const& p, bool backward);
void run_channel_last(ConvParams const& p, bool backward, void* workspace, void* stream);
void run_channel_first(ConvParams const& p, bool backward, void* workspace, void* stream);

}  // namespace lsm::conv
