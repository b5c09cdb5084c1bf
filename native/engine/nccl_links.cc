#include "engine/nccl_links.h"

#include "engine/error.h"

#ifdef STROMA_NCCL

#include <ATen/Functions.h>

#include <map>
#include <set>

#include "engine/cuda_device.h"
#include "engine/nccl_line.h"

namespace stroma::engine::nccl {
namespace {

class NcclLinks final : public Links {
  struct End {
    c10::intrusive_ptr<Line> line;
    at::Tensor staging;  // on the card, for places on the host; grows
    bool aborted = false;
  };

 public:
  NcclLinks(at::Device device, std::shared_ptr<Ranks> ranks) : device_(device), ranks_(std::move(ranks)) {}

  ~NcclLinks() override {
    std::vector<c10::intrusive_ptr<Line>> lines;
    for (auto& [pair, end] : ends_)
      if (!end.aborted) lines.push_back(std::move(end.line));
    close_lines(device_, *ranks_, std::move(lines));
  }

  void open(const Tape& tape) override {
    const int self = ranks_->spec().rank;
    std::set<Pair> wanted;  // in the order that all ranks make lines in
    for (const Instruction& at : tape.instructions) {
      if (at.op == Instruction::Op::kSend) wanted.insert({self, at.peer});
      if (at.op == Instruction::Op::kReceive) wanted.insert({at.peer, self});
    }
    for (const Pair& pair : wanted)
      if (ends_.count(pair) == 0) ends_.emplace(pair, End{make_line(device_, ranks_, pair, kTapeLane), {}, false});
  }

  void exchange(const Tape& tape, const Memory& memory, const Instruction& at) override {
    const bool sends = at.op == Instruction::Op::kSend;
    const int self = ranks_->spec().rank;
    End& end = ends_.at(sends ? Pair{self, at.peer} : Pair{at.peer, self});
    const at::Tensor held = memory.view(tape.places[sends ? at.from : at.to], 0, {at.bytes}, at::kByte);
    const at::Tensor bytes = held.is_cuda() ? held : staging(end, at.bytes);
    if (sends && !held.is_cuda()) cuda::transfer(device_, bytes.mutable_data_ptr(), held.const_data_ptr(), at.bytes);
    ranks_->meet(at.peer, sends, kTapeLane);
    std::string why;
    try {
      const auto work = end.line->begin(bytes);
      why = finish(*work, *ranks_, at.bytes);
    } catch (const std::exception& error) {
      why = brief(error.what());
    }
    if (!why.empty() || !ranks_->lost().empty()) {
      end.aborted = true;
      abort_line(device_, end.line);
      ranks_->lose(at.peer, why);
    }
    if (!sends && !held.is_cuda()) cuda::transfer(device_, held.mutable_data_ptr(), bytes.const_data_ptr(), at.bytes);
    ranks_->moved(sends ? at.bytes : 0, sends ? 0 : at.bytes);
  }

 private:
  at::Tensor staging(End& end, int64_t bytes) const {
    if (!end.staging.defined() || end.staging.numel() < bytes)
      end.staging = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device_));
    return end.staging.narrow(0, 0, bytes);
  }

  const at::Device device_;
  const std::shared_ptr<Ranks> ranks_;
  std::map<Pair, End> ends_;  // changed by open() alone
};

}  // namespace

std::string version() { return c10d::getNcclVersion(); }

std::unique_ptr<Links> links(at::Device device, std::shared_ptr<Ranks> ranks) {
  return std::make_unique<NcclLinks>(device, std::move(ranks));
}

}  // namespace stroma::engine::nccl

#else

namespace stroma::engine::nccl {

std::string version() { return {}; }

std::unique_ptr<Links> links(at::Device, std::shared_ptr<Ranks>) {
  fail("NOT_SET_UP",
       "[nccl] this build of the addon has no NCCL. Run `npx stroma setup --cuda` with nvidia-nccl beside libtorch, or "
       "use transport \"gloo\"");
}

}  // namespace stroma::engine::nccl

#endif
