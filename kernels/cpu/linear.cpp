// Cuts a matrix product into tiles and hands them to the threads.
#include "linear.h"

#include <algorithm>
#include <cstdlib>

#include "pool.h"

namespace tandem {
namespace {

constexpr long kChunkBytes = 8 << 20;    // packed x that is multiplied at once: a part of the last-level cache
constexpr long kPieceBytes = 640 << 10;  // packed x that is walked panel by panel: most of a core's L2
constexpr long kRangeBytes = 192 << 10;  // of a panel per tile: stays in L2 while blocks are walked
constexpr long kAheadBytes = 4096;       // how far ahead to fetch where every byte of a panel is used once
constexpr long kTasksPerThread = 8;      // enough to even out, few enough to stream long runs
constexpr long kPackAlone = 32 << 10;    // bytes that are packed sooner than a second thread would join in

long ceil_divide(long a, long b) { return (a + b - 1) / b; }

// Grows, never shrinks; starts on a page.
class Scratch {
  public:
    ~Scratch() { std::free(bytes_); }
    char* at_least(long size) {
        if (size > size_) {
            std::free(bytes_);
            size_ = (size + 4095) / 4096 * 4096;
            bytes_ = static_cast<char*>(std::aligned_alloc(4096, size_));
            if (!bytes_) std::abort();
        }
        return bytes_;
    }

  private:
    char* bytes_ = nullptr;
    long size_ = 0;
};

thread_local Scratch packed_rows;  // of the calling thread: calls of several threads do not meet
thread_local Scratch partial_sums;

// `total` in `count` shares of at most `most`, which differ by at most one, the larger ones first.
struct Shares {
    Shares(long total, long most)
        : count(ceil_divide(total, most)), smaller(total / count), larger_count(total % count) {}
    long first(long share) const { return share * smaller + (share < larger_count ? share : larger_count); }
    long size(long share) const { return smaller + (share < larger_count); }
    long count, smaller, larger_count;
};

// One call, or the part of it whose packed rows are kChunkBytes.
class Chunk {
  public:
    Chunk(const LinearArgs& args, const LinearKernel& kernel, long first_row, long rows)
        : args_(args),
          kernel_(kernel),
          first_row_(first_row),
          blocks_(rows, kernel.max_rows),
          steps_(ceil_divide(args.in_features, kernel.values_per_step)),
          // Whole lines per row: `pack` writes past the last step.
          block_bytes_(ceil_divide(steps_ * kernel.row_bytes_per_step, 64) * 64 * (blocks_.smaller + 1)),
          panel_bytes_(steps_ * kernel.panel_bytes_per_step),
          panels_(ceil_divide(args.out_features, kColumns)) {}

    void run() {
        packed_ = pack();
        const long tasks = kTasksPerThread * threads();
        if (blocks_.count == 1) {
            const Shares runs(panels_, std::max(panels_ / tasks, 1L));
            parallel_local(runs.count, [&](long run, int) {
                for (long i = 0; i < runs.size(run); ++i) multiply(runs.first(run) + i, 0, 1);
            });
            return;
        }
        const long pieces = ceil_divide(blocks_.count * block_bytes_, kPieceBytes);
        // As many cuts for each thread, so that it multiplies the rows that it packed.
        const long cuts_per_thread = ceil_divide(std::max(ceil_divide(tasks, panels_), pieces), threads());
        const long cuts = std::min(cuts_per_thread * threads(), blocks_.count);
        parallel_local(cuts * panels_, [&](long task, int) {
            const long cut = task / panels_, panel = task % panels_;
            multiply(panel, blocks_.count * cut / cuts, blocks_.count * (cut + 1) / cuts);
        });
    }

  private:
    const char* pack() {
        // One row of whole lanes is packed as it is.
        if (blocks_.count == 1 && blocks_.smaller == 1 && args_.format <= kWeightBfloat16 &&
            args_.in_features % kernel_.values_per_step == 0) {
            const long element = args_.element == kFloat32 ? 4 : 2;
            return static_cast<const char*>(args_.x) + first_row_ * args_.x_stride * element;
        }
        char* packed = packed_rows.at_least(blocks_.count * block_bytes_);
        const auto pack_block = [&](long block, int) {
            kernel_.pack(args_, first_row_ + blocks_.first(block), blocks_.size(block), packed + block * block_bytes_);
        };
        if (blocks_.count * block_bytes_ <= kPackAlone) {
            for (long block = 0; block < blocks_.count; ++block) pack_block(block, 0);
        } else {
            parallel_local(blocks_.count, pack_block);
        }
        return packed;
    }

    // All blocks of [begin, end) times one panel.
    void multiply(long panel, long begin, long end) const {
        const long element = args_.element == kFloat32 ? 4 : 2;
        const long column = panel * kColumns, columns = args_.out_features - column;
        Tile tile;
        tile.bias = args_.bias ? args_.bias + column : nullptr;
        tile.lanes[0] = first_lanes(columns);
        tile.lanes[1] = first_lanes(columns - 16);
        tile.y_stride = args_.y_stride;
        tile.element = args_.element;
        tile.ahead_step = ceil_divide(kernel_.panel_bytes_per_step, end - begin);
        const Shares ranges(ceil_divide(steps_, kLanes), kRangeBytes / kernel_.panel_bytes_per_step / kLanes);
        // With one range no sums outlive their tile: all use the same few lines, which then stay in L1.
        const long partial_stride = ranges.count == 1 ? 0 : kernel_.max_rows * kColumns;
        const long partial_floats = partial_stride * (end - begin - 1) + kernel_.max_rows * kColumns;
        float* partial = reinterpret_cast<float*>(partial_sums.at_least(partial_floats * sizeof(float)));
        for (long range = 0; range < ranges.count; ++range) {
            const long step = ranges.first(range) * kLanes, left = steps_ - step;
            tile.steps = std::min(left, ranges.size(range) * kLanes);
            tile.panel = static_cast<const char*>(args_.weights) + panel * panel_bytes_ +
                         step * kernel_.panel_bytes_per_step;
            tile.first = range == 0;
            tile.last = range + 1 == ranges.count;
            const long range_bytes = tile.steps * kernel_.panel_bytes_per_step;
            const long ahead = end - begin == 1 ? std::min(range_bytes, kAheadBytes) : range_bytes;
            for (long block = begin; block < end; ++block) {
                const long rows = blocks_.size(block);
                tile.block = packed_ + block * block_bytes_ + step * kernel_.row_bytes_per_step * rows;
                tile.ahead = tile.panel + ahead + (block - begin) * tile.steps * tile.ahead_step;
                tile.partial = partial + (block - begin) * partial_stride;
                tile.y = static_cast<char*>(args_.y) +
                         ((first_row_ + blocks_.first(block)) * args_.y_stride + column) * element;
                kernel_.tiles[rows](tile);
            }
        }
    }

    const LinearArgs& args_;
    const LinearKernel& kernel_;
    const long first_row_;
    const Shares blocks_;
    const long steps_, block_bytes_, panel_bytes_, panels_;
    const char* packed_ = nullptr;
};

}  // namespace
}  // namespace tandem

void tandem_linear(const LinearArgs* args) {
    using namespace tandem;
    if (args->rows <= 0 || args->out_features <= 0) return;
    const LinearKernel& kernel = args->format <= kWeightBfloat16 ? dense_kernel(*args) : integer_kernel(*args);
    const long row_bytes = ceil_divide(args->in_features, kernel.values_per_step) * kernel.row_bytes_per_step;
    const Shares chunks(args->rows, std::max<long>(kChunkBytes / row_bytes, kernel.max_rows));
    for (long chunk = 0; chunk < chunks.count; ++chunk) {
        Chunk(*args, kernel, chunks.first(chunk), chunks.size(chunk)).run();
    }
}
