#pragma once

// Exits that were fitted to a model, as drex takes them: for llama-server, and for other programs that use libllama and drex.
// See llama-layer-exits.h.

#include "llama.h"

#include <drex.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

class common_drex_exits {
public:
    // what errors call the options that name the file, and layers of it
    struct options {
        std::string file;
        std::string layers;
    };

    // Reads what drex is made from; throws std::runtime_error with what is wrong.
    // only: those of the file's layers that are exits, empty: all of them
    common_drex_exits(const options & names, const std::string & path, const std::vector<uint32_t> & only);

    // Gives the context its exits, after llama_layer_range_init(); throws std::runtime_error with what is wrong.
    void load(llama_context * ctx, const std::string & path_model);

    const std::vector<uint32_t> & layers() const { return ramp_layers; }

    // Says of a ramp's logits which tokens they are of, and how sure they make.
    void describe(drex_logits & logits, uint32_t ramp) const;

    // Takes the logits of the head's tokens out of rows of all tokens, for describe().
    void pick(drex_logits & logits);

private:
    const options     names;
    const std::string path;

    std::vector<uint32_t>                        ramp_layers;
    std::vector<std::array<drex_calibration, 3>> calibrations; // of each ramp, empty: confidences stay as they are

    const int32_t * tokens   = nullptr;
    int32_t         n_tokens = 0;

    std::vector<float> picked;
};
