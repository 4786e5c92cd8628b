// A simulated accelerator: two devices whose kernels are the CPU's, and whose asynchrony is the worst that is allowed.
//
// 1. Memory: every block is filled with 0xFF, which is NaN in floating point, when it is handed out and when it is
//    freed, and blocks are used again, as a caching allocator does. Sizes are rounded to 512 bytes and counted.
// 2. Kernels: a boxed fallback runs the CPU's on tensors over the same storages, so that views, out= and buffers that a
//    kernel writes hold. What is new is copied to the device.
// 3. Random numbers: a generator for each device; the CPU's is not touched.
// 4. Waits: whatever would make the host wait for a device is counted by name, or raises.
// 5. A non-blocking copy to pinned memory arrives late: the host reads NaN until an event that was recorded behind it on
//    its stream is done, which it is at the third query, or until somebody waits.
// 6. While a stream is captured, waiting, asking for an event and reading a generator raise, as CUDA has it.

#include <Python.h>  // first, as it asks

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <chrono>
#include <deque>
#include <map>
#include <mutex>

namespace at::autocast {  // its header includes every operator
TORCH_API Tensor cached_cast(ScalarType, const Tensor&, c10::DeviceType);
TORCH_API ScalarType get_autocast_dtype(c10::DeviceType);
}  // namespace at::autocast

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::IValue;
using Stack = torch::jit::Stack;

constexpr DeviceIndex kDevices = 2;
constexpr auto kType = c10::DeviceType::PrivateUse1;
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

thread_local DeviceIndex current = 0;
thread_local std::array<c10::StreamId, kDevices> streams{};

std::recursive_mutex lock;
using Locked = std::lock_guard<std::recursive_mutex>;

// ---- waits and streams: rules 4 to 6 -------------------------------------------------------------------------------

struct Copy {
  int64_t number;
  std::vector<char> data;
  char* to;
};

struct Lane {  // what a stream has been told
  int64_t issued = 0, arrived = 0;
  std::deque<Copy> copies;
};

std::map<std::pair<DeviceIndex, c10::StreamId>, Lane> lanes;
c10::Dict<std::string, int64_t> waits;
bool waiting_raises = false;
bool capturing = false;
c10::StreamId last_stream = 0;

void refuse_while_capturing(const std::string& what) {
  TORCH_CHECK(!capturing, "operation not permitted when stream is capturing: ", what);
}

void arrive(Lane& lane, int64_t number) {
  for (; !lane.copies.empty() && lane.copies.front().number <= number; lane.copies.pop_front()) {
    std::memcpy(lane.copies.front().to, lane.copies.front().data.data(), lane.copies.front().data.size());
  }
  lane.arrived = std::max(lane.arrived, number);
}

void wait(const std::string& why, DeviceIndex device, std::optional<c10::StreamId> stream = std::nullopt) {
  Locked guard(lock);
  refuse_while_capturing(why);
  TORCH_CHECK(!waiting_raises, "the host waits for the device: ", why);
  waits.insert_or_assign(why, waits.contains(why) ? waits.at(why) + 1 : 1);
  for (auto& [place, lane] : lanes) {
    if (place.first == device && (!stream || place.second == *stream)) arrive(lane, lane.issued);
  }
}

void send_late(DeviceIndex device, const void* from, void* to, size_t bytes) {
  Locked guard(lock);
  auto& lane = lanes[{device, streams[device]}];
  auto begin = static_cast<const char*>(from);
  lane.copies.push_back({++lane.issued, {begin, begin + bytes}, static_cast<char*>(to)});
  std::memset(to, 0xFF, bytes);
}

struct Event {
  DeviceIndex device;
  c10::StreamId stream;
  int64_t number;
  int queries = 0;
  std::chrono::steady_clock::time_point time;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  Device getDevice() const override { return Device(kType, current); }
  Device exchangeDevice(Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() >= 0 && device.index() < kDevices, "invalid device ordinal ", int(device.index()));
    current = device.index();
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }

  DeviceIndex index_of(Device device) const { return device.has_index() ? device.index() : current; }
  c10::Stream stream(Device device, c10::StreamId id) const {
    return c10::Stream(c10::Stream::UNSAFE, Device(kType, index_of(device)), id);
  }
  c10::Stream getStream(Device device) const override { return stream(device, streams[index_of(device)]); }
  c10::Stream getDefaultStream(Device device) const override { return stream(device, 0); }
  c10::Stream getNewStream(Device device, int) const override {
    Locked guard(lock);
    return stream(device, ++last_stream);
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    auto before = getStream(next.device());
    streams[next.device_index()] = next.id();
    return before;
  }
  bool isStreamCapturing(const c10::Stream&) const override { return capturing; }
  bool queryStream(const c10::Stream& of) const override {
    Locked guard(lock);
    return lanes[{of.device_index(), of.id()}].copies.empty();
  }
  void synchronizeStream(const c10::Stream& of) const override {
    wait("synchronize a stream", of.device_index(), of.id());
  }
  void synchronizeDevice(const DeviceIndex device) const override { wait("synchronize", device); }

  void record(void** event, const c10::Stream& on, const DeviceIndex device, const c10::EventFlag) const override {
    TORCH_CHECK(device == -1 || device == on.device_index(), "an event of another device than its stream");
    Locked guard(lock);
    auto& lane = lanes[{on.device_index(), on.id()}];
    if (*event == nullptr) *event = new Event();
    *static_cast<Event*>(*event) = {on.device_index(), on.id(), ++lane.issued, 0, std::chrono::steady_clock::now()};
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void block(void* event, const c10::Stream& on) const override {}  // kernels run at once, in order of their issue
  bool queryEvent(void* event) const override {
    refuse_while_capturing("query an event");
    Locked guard(lock);
    auto& it = *static_cast<Event*>(event);
    auto& lane = lanes[{it.device, it.stream}];
    if (lane.arrived < it.number && ++it.queries >= 3) arrive(lane, it.number);
    return lane.arrived >= it.number;
  }
  void synchronizeEvent(void* event) const override {
    auto& it = *static_cast<Event*>(event);
    wait("synchronize an event", it.device, it.stream);
  }
  double elapsedTime(void* first, void* second, const DeviceIndex) const override {
    auto apart = static_cast<Event*>(second)->time - static_cast<Event*>(first)->time;
    return std::chrono::duration<double, std::milli>(apart).count();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ---- memory: rule 1 ------------------------------------------------------------------------------------------------

struct Block {
  size_t size;
  DeviceIndex device;  // below zero: pinned memory of the host
};

std::map<void*, Block> blocks;
std::map<std::pair<DeviceIndex, size_t>, std::deque<void*>> unused;
std::array<c10::CachingDeviceAllocator::DeviceStats, kDevices> stats;

void* take(DeviceIndex device, size_t bytes) {
  Locked guard(lock);
  size_t size = (bytes + 511) / 512 * 512;
  auto& free = unused[{device, size}];
  void* found = nullptr;
  if (free.empty()) {
    TORCH_CHECK(posix_memalign(&found, 64, size) == 0, "out of memory");
  } else {
    found = free.front();
    free.pop_front();
  }
  std::memset(found, 0xFF, size);
  blocks[found] = {size, device};
  if (device >= 0) {
    stats[device].allocation[0].increase(1);
    stats[device].allocated_bytes[0].increase(size);
  }
  return found;
}

void give_back(void* data) {
  Locked guard(lock);
  auto [size, device] = blocks.at(data);
  blocks.erase(data);
  std::memset(data, 0xFF, size);
  unused[{device, size}].push_back(data);
  if (device >= 0) {
    stats[device].allocation[0].decrease(1);
    stats[device].allocated_bytes[0].decrease(size);
  }
}

void free_pinned(void* data) {
  Locked guard(lock);
  auto begin = static_cast<char*>(data), end = begin + blocks.at(data).size;
  for (auto& [_, lane] : lanes) {  // what nobody can read need not arrive
    auto& copies = lane.copies;
    auto lost = [&](const Copy& copy) { return begin <= copy.to && copy.to < end; };
    copies.erase(std::remove_if(copies.begin(), copies.end(), lost), copies.end());
  }
  give_back(data);
}

struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? take(-1, bytes) : nullptr;
    return {data, data, bytes ? &free_pinned : &c10::detail::deleteNothing, Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} pinned;

bool is_pinned(const void* data) {
  Locked guard(lock);
  auto next = blocks.upper_bound(const_cast<void*>(data));
  if (next == blocks.begin()) return false;
  auto [begin, block] = *--next;
  return block.device < 0 && data < static_cast<char*>(begin) + block.size;
}

struct Memory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? take(current, bytes) : nullptr;
    return {data, data, bytes ? &give_back : &c10::detail::deleteNothing, Device(kType, current)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    Locked guard(lock);
    for (auto& [_, free] : unused) std::for_each(free.begin(), free.end(), &std::free);
    unused.clear();
  }
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    Locked guard(lock);
    return stats.at(device);
  }
  void resetAccumulatedStats(DeviceIndex device) override {
    stats.at(device).allocation[0].reset_accumulated();
    stats.at(device).allocated_bytes[0].reset_accumulated();
  }
  void resetPeakStats(DeviceIndex device) override {
    stats.at(device).allocation[0].reset_peak();
    stats.at(device).allocated_bytes[0].reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    size_t total = size_t(1) << 34;
    return {total - getDeviceStats(device).allocated_bytes[0].current, total};
  }
} memory;

c10::AllocatorRegisterer<kType> registered_memory(&memory);

void resize_storage(c10::StorageImpl* storage, size_t bytes) {
  c10::DeviceGuard guard(storage->device());
  auto data = memory.allocate(bytes);
  auto kept = std::min(bytes, storage->nbytes());
  if (kept) std::memcpy(data.get(), storage->data(), kept);
  storage->set_data_ptr_noswap(std::move(data));
  storage->set_nbytes(bytes);
}

// ---- random numbers: rule 3 ----------------------------------------------------------------------------------------

struct Generator final : c10::GeneratorImpl {
  explicit Generator(DeviceIndex device, at::Generator of = at::detail::createCPUGenerator())
      : c10::GeneratorImpl(Device(kType, device), kKeys), inner(std::move(of)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t) override { TORCH_CHECK(false, "no offsets"); }
  uint64_t get_offset() const override { TORCH_CHECK(false, "no offsets"); }
  uint64_t current_seed() const override {
    refuse_while_capturing("current_seed");
    return inner.current_seed();
  }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override {
    refuse_while_capturing("set_state");
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    refuse_while_capturing("get_state");
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override { return new Generator(device().index(), inner.clone()); }
  at::Generator inner;
};

const at::Generator& generator_of(DeviceIndex device) {
  static std::array<at::Generator, kDevices> all{
      at::make_generator<Generator>(DeviceIndex(0)), at::make_generator<Generator>(DeviceIndex(1))};
  return all.at(device < 0 ? current : device);
}

bool generators_are_shown = false;  // torch.Generator(device) is the device's own: nothing else shows it to Python

at::Generator inner_of(const at::Generator& generator) {
  TORCH_CHECK(
      generator.device().type() == kType, "Expected a 'sim' device type for generator but found '",
      c10::DeviceTypeName(generator.device().type(), true), "'");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
}

// Kernels that take no generator draw from the CPU's, which is another one for as long: no other thread may look at it
// meanwhile, draw from it, or lend it, so that Python waits.
struct Lent {
  explicit Lent(DeviceIndex device)
      : python(PyGILState_Ensure()), mine(inner_of(generator_of(device))), theirs(at::detail::getDefaultCPUGenerator()) {
    before = theirs.get_state();
    theirs.set_state(mine.get_state());
  }
  ~Lent() {
    mine.set_state(theirs.get_state());
    theirs.set_state(before);
    PyGILState_Release(python);
  }
  PyGILState_STATE python;
  at::Generator mine, theirs;
  Tensor before;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override { return generator_of(device); }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    if (generators_are_shown) return generator_of(device);
    return at::make_generator<Generator>(device < 0 ? current : device);
  }
  Device getDeviceFromPtr(void* data) const override { return Device(kType, blocks.at(data).device); }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage.unsafeGetStorageImpl(), bytes);
  }
  DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(DeviceIndex device) const override { Guard().setDevice(Device(kType, device)); }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return Guard().exchangeDevice(Device(kType, device)).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
} hooks;

// ---- kernels: rule 2 -----------------------------------------------------------------------------------------------

bool is_ours(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kType; }

// A tensor over a storage, laid out as another one.
Tensor over(c10::Storage storage, c10::DispatchKeySet keys, const Tensor& like) {
  auto impl = c10::make_intrusive<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  Tensor out(std::move(impl));
  out._set_conj(like.is_conj());
  out._set_neg(like.is_neg());
  return out;
}

// The arguments of one call on the CPU, and its results on the device.
struct Call {
  explicit Call(const c10::OperatorHandle& op) : op(op) {}

  const c10::OperatorHandle& op;
  std::optional<Device> device;  // of its tensors
  std::vector<std::pair<Tensor, Tensor>> lent;  // ours, and the CPU's over the same storage
  std::map<c10::StorageImpl*, c10::Storage> to_cpu, to_ours;

  void meet(const Tensor& tensor) {
    if (!tensor.defined()) return;
    bool number = tensor.device().is_cpu() && tensor.dim() == 0;
    bool index = tensor.device().is_cpu() && op.schema().name().rfind("aten::index", 0) == 0;
    bool mixed = device && *device != tensor.device() && !number && !index;
    TORCH_CHECK(
        !mixed, "Expected all tensors to be on the same device, but found at least two devices, ", *device, " and ",
        tensor.device(), "! (", op.schema().name(), ")");
    if (!number && !index) device = tensor.device();
  }

  Tensor cpu(const Tensor& tensor) {
    if (!is_ours(tensor)) return tensor;
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    if (!to_cpu.count(storage)) {
      c10::DataPtr data(storage->mutable_data(), Device(c10::DeviceType::CPU));
      to_cpu[storage] = c10::Storage(
          c10::Storage::use_byte_size_t(), storage->nbytes(), std::move(data), c10::GetAllocator(c10::kCPU), true);
      to_ours[to_cpu[storage].unsafeGetStorageImpl()] = tensor.storage();
    }
    lent.emplace_back(tensor, over(to_cpu[storage], c10::DispatchKeySet(c10::DispatchKey::CPU), tensor));
    return lent.back().second;
  }

  Tensor ours(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    for (auto& [own, borrowed] : lent) {
      if (borrowed.is_same(tensor)) return own;
    }
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    if (!to_ours.count(storage)) {
      auto data = memory.allocate(storage->nbytes());
      if (storage->nbytes()) std::memcpy(data.get(), storage->data(), storage->nbytes());
      to_ours[storage] =
          c10::Storage(c10::Storage::use_byte_size_t(), storage->nbytes(), std::move(data), &memory, true);
      kept.push_back(tensor.storage());
    }
    return over(to_ours[storage], kKeys, tensor);
  }
  std::vector<c10::Storage> kept;  // so that an address means one storage

  // What a kernel has resized, or conjugated by its flag, is so for us.
  void follow() {
    for (auto& [own, borrowed] : lent) {
      auto* mine = own.storage().unsafeGetStorageImpl();
      auto* theirs = borrowed.storage().unsafeGetStorageImpl();
      if (theirs->data() != mine->data()) {
        resize_storage(mine, theirs->nbytes());
        std::memcpy(mine->mutable_data(), theirs->data(), theirs->nbytes());
      }
      if (own.sizes() != borrowed.sizes() || own.strides() != borrowed.strides()) {
        own.unsafeGetTensorImpl()->set_sizes_and_strides(
            borrowed.sizes(), borrowed.strides(), borrowed.storage_offset());
      }
      if (own.is_conj() != borrowed.is_conj()) own._set_conj(borrowed.is_conj());
    }
  }
};

template <class Fn>
void each(const IValue& value, Fn fn) {
  if (value.isTensor()) fn(value.toTensor());
  else if (value.isList()) {
    for (const IValue& item : value.toListRef()) each(item, fn);
  }
}

template <class Fn>
IValue mapped(const IValue& value, Fn fn) {
  if (value.isTensor()) return fn(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> out;
    for (const Tensor& item : value.toTensorVector()) out.push_back(fn(item));
    return out;
  }
  if (!value.isList() || !value.type()->castRaw<c10::ListType>()) return value;
  auto list = value.toList();
  if (list.elementType()->kind() != c10::TypeKind::OptionalType) return value;
  auto out = c10::impl::GenericList(list.elementType());
  for (const IValue& item : value.toListRef()) out.push_back(mapped(item, fn));
  return out;
}

bool takes(const c10::Argument& argument, c10::TypeKind kind) {
  auto optional = argument.type()->cast<c10::OptionalType>();
  return (optional ? optional->getElementType() : argument.type())->kind() == kind;
}

void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  const auto begin = stack->size() - count;
  Call call(op);
  for (size_t i = 0; i < count; ++i) each((*stack)[begin + i], [&](const Tensor& t) { call.meet(t); });
  bool draws = op.hasTag(at::Tag::nondeterministic_seeded), takes_generator = false;
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[begin + i];
    if (value.isDevice() && value.toDevice().type() == kType) {
      call.device = Device(kType, Guard().index_of(value.toDevice()));
      value = Device(c10::DeviceType::CPU);
    }
  }
  auto device = call.device.value_or(Guard().getDevice());
  if (device.type() != kType) device = Guard().getDevice();
  c10::DeviceGuard guard(device);
  if (op.hasTag(at::Tag::dynamic_output_shape) || op.hasTag(at::Tag::data_dependent_output)) {
    wait(schema.name(), device.index(), streams[device.index()]);
  }
  for (size_t i = 0; i < count; ++i) {
    auto& value = (*stack)[begin + i];
    bool is_generator = takes(schema.arguments()[i], c10::TypeKind::GeneratorType);
    takes_generator = takes_generator || is_generator;
    if (is_generator && !value.isNone()) value = inner_of(value.toGenerator());
    else if (is_generator && draws) value = inner_of(generator_of(device.index()));
    else value = mapped(value, [&](const Tensor& t) { return call.cpu(t); });
  }
  {
    std::optional<Lent> lent;
    if (draws && !takes_generator) lent.emplace(device.index());
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  call.follow();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    (*stack)[i] = mapped((*stack)[i], [&](const Tensor& t) { return call.ours(t); });
  }
}

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) { run_on_cpu(op, stack); }

// ---- what is not a kernel of the CPU -------------------------------------------------------------------------------

Device device_or_current(std::optional<Device> device) {
  return Device(kType, device ? Guard().index_of(*device) : current);
}

Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device_or_current(device));
  return Tensor(at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(dtype), format));
}

Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device_or_current(device));
  return Tensor(at::detail::empty_strided_generic(size, stride, &memory, kKeys, c10::dtype_or_default(dtype)));
}

Tensor as_strided(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

Tensor view(const Tensor& self, at::IntArrayRef size) { return at::native::view(self, size); }

Tensor reshape_alias(const Tensor& self, at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::as_strided_tensorimpl(self, size, stride, self.storage_offset());
}

Tensor zeros(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<Device> device, std::optional<bool> pin) {
  auto out = empty(size, dtype, layout, device, pin, std::nullopt);
  if (out.nbytes()) std::memset(out.mutable_data_ptr(), 0, out.nbytes());
  return out;
}

void fit(const Tensor& self) {
  auto bytes = at::detail::computeStorageNbytes(
      self.sizes(), self.strides(), self.dtype().itemsize(), self.storage_offset());
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (self.numel() && bytes > storage->nbytes()) resize_storage(storage, bytes);
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  if (self.sizes() != size) self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  fit(self);
  return self;
}

Tensor& set_(Tensor& self, at::Storage source, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.empty() && !size.empty()) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  fit(self);
  return self;
}

Tensor& set_whole(Tensor& self, at::Storage source) {
  auto size = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_(self, std::move(source), 0, {size}, {});
}

Tensor& set_nothing(Tensor& self) {
  c10::DeviceGuard guard(self.device());
  return set_(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, &memory, true), 0, {0}, {});
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  Call call(op);
  auto from = call.cpu(self), into = call.cpu(to);
  bool is_read = is_ours(self) && !is_ours(to);
  auto& host = is_read ? to : self;
  if (is_ours(self) && is_ours(to)) {
    into.copy_(from);
  } else if (!host.numel()) {
  } else if (is_read && non_blocking && host.is_pinned()) {
    auto sent = from.to(into.scalar_type()).resolve_conj().resolve_neg().contiguous();
    TORCH_CHECK(into.is_contiguous(), "a late copy to a tensor that is not contiguous");
    send_late(self.device().index(), sent.const_data_ptr(), into.mutable_data_ptr(), sent.nbytes());
  } else {
    bool is_free = non_blocking && !is_read && host.is_pinned();
    auto device = (is_read ? self : to).device().index();
    if (!is_free && !(host.dim() == 0 && !is_read)) {
      wait(is_read ? "copy to the host" : "copy from pageable memory", device, streams[device]);
    }
    into.copy_(from);
  }
  return to;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  if (self.sizes() != to.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}

at::Scalar local_scalar(const Tensor& self) {
  wait("item", self.device().index(), streams[self.device().index()]);
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::_local_scalar_dense", "");
  Call call(op);
  return at::_local_scalar_dense(call.cpu(self));
}

Tensor convolution(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
  Call call(op);
  c10::DeviceGuard guard(x.device());
  for (const Tensor& tensor : {x, weight, bias.value_or(Tensor())}) call.meet(tensor);
  auto b = bias && bias->defined() ? std::optional<Tensor>(call.cpu(*bias)) : std::nullopt;
  return call.ours(at::convolution(
      call.cpu(x), call.cpu(weight), b, stride, padding, dilation, transposed, output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gy, const Tensor& x, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> mask) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution_backward", "");
  Call call(op);
  c10::DeviceGuard guard(x.device());
  std::vector<int64_t> bias{weight.size(transposed ? 1 : 0) * (transposed ? groups : 1)};
  auto [gx, gw, gb] = at::convolution_backward(
      call.cpu(gy), call.cpu(x), call.cpu(weight), bias, stride, padding, dilation, transposed, output_padding, groups,
      mask);
  return {call.ours(gx), call.ours(gw), call.ours(gb)};
}

int64_t fused_sdp_choice(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>,
    bool) {
  return 0;  // as written down in torch's operators
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_efficientzerotensor", &zeros);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_", &set_nothing);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("_fused_sdp_choice", &fused_sdp_choice);
}

// A copy reads conjugated and negated tensors as what they stand for.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

// ---- autocast ------------------------------------------------------------------------------------------------------

template <bool lower>
void cast(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKey::AutocastPrivateUse1);
  auto dtype = lower ? at::autocast::get_autocast_dtype(kType) : at::kFloat;
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); ++i) {
    (*stack)[i] = mapped((*stack)[i], [&](const Tensor& t) {
      return t.defined() ? at::autocast::cached_cast(dtype, t, kType) : t;
    });
  }
  op.callBoxed(stack);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  for (auto name : {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d.input", "convolution", "addmm",
                    "addmv", "matmul", "einsum", "mm", "mv", "linear", "baddbmm", "bmm", "prelu",
                    "scaled_dot_product_attention"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&cast<true>>());
  }
  for (auto name : {"exp", "expm1", "log", "log1p", "reciprocal", "rsqrt", "tan", "pow.Tensor_Scalar", "softplus",
                    "layer_norm", "group_norm", "rms_norm", "nll_loss", "l1_loss", "mse_loss", "logsumexp", "prod",
                    "softmax.int", "log_softmax.int", "cumsum", "sum", "sum.dim_IntList"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&cast<false>>());
  }
}

// ---- what the tests ask --------------------------------------------------------------------------------------------

TORCH_LIBRARY(sim, m) {
  m.def("show_generators(bool on) -> bool", [](bool on) { return std::exchange(generators_are_shown, on); });
  m.def("waits() -> Dict(str, int)", []() { return waits.copy(); });
  m.def("forget_waits() -> ()", []() { waits.clear(); });
  m.def("raise_at_waits(bool on) -> bool", [](bool on) { return std::exchange(waiting_raises, on); });
  m.def("capture(bool on) -> bool", [](bool on) { return std::exchange(capturing, on); });
  m.def("is_capturing() -> bool", []() { return capturing; });
}

struct Register {
  Register() { at::RegisterPrivateUse1HooksInterface(&hooks); }
} registered;

}  // namespace
