// A pretend accelerator: several devices whose tensors lie in host memory. Every operator runs on the CPU over the same
// bytes, after the checks that a real accelerator would make: no tensors of two devices, no tensors of the host with
// dimensions. Reads of values by the host are counted, and so are operators by device.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/functional.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
using torch::jit::Stack;

constexpr auto kPretend = c10::DeviceType::PrivateUse1;
constexpr auto kKey = c10::DispatchKey::PrivateUse1;

DeviceIndex device_count = 2;
thread_local DeviceIndex current = 0;

struct Counts {
  std::mutex mutex;
  std::map<std::string, int64_t> reads;
  std::map<int64_t, int64_t> operators;
  py::object on_read;
};

Counts& counts() {
  static Counts* found = new Counts();
  return *found;
}

void count_read(const std::string& what) {
  {
    std::lock_guard<std::mutex> lock(counts().mutex);
    ++counts().reads[what];
  }
  if (counts().on_read) {
    py::gil_scoped_acquire gil;
    if (!counts().on_read.is_none()) counts().on_read(what);
  }
}

// ---- memory

struct HostMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto data = c10::GetCPUAllocator()->allocate(bytes);
    data.unsafe_set_device(Device(kPretend, current));
    return data;
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return c10::GetCPUAllocator()->raw_deleter();
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

HostMemory memory;

// Host memory that a device copies to by itself, as the host need not wait for such a copy.
struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto* kept = new c10::DataPtr(c10::GetCPUAllocator()->allocate(bytes));
    {
      std::lock_guard<std::mutex> lock(mutex);
      pinned.insert(kept->get());
    }
    return {kept->get(), kept, &release, Device(c10::DeviceType::CPU)};
  }
  static void release(void* kept) {
    auto* data = static_cast<c10::DataPtr*>(kept);
    {
      std::lock_guard<std::mutex> lock(mutex);
      pinned.erase(data->get());
    }
    delete data;
  }
  static bool holds(const void* data) {
    std::lock_guard<std::mutex> lock(mutex);
    return pinned.count(const_cast<void*>(data)) > 0;
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
  inline static std::mutex mutex;
  inline static std::set<void*> pinned;
};

PinnedMemory pinned_memory;

// ---- devices and streams: one stream a device, and the host waits for every kernel

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kPretend; }
  Device exchangeDevice(Device to) const override {
    auto before = getDevice();
    setDevice(to);
    return before;
  }
  Device getDevice() const override { return Device(kPretend, current); }
  void setDevice(Device to) const override {
    TORCH_CHECK(to.index() < device_count, "pretend: there is no device ", to.index());
    if (to.has_index()) current = to.index();
  }
  void uncheckedSetDevice(Device to) const noexcept override {
    if (to.has_index()) current = to.index();
  }
  Stream getStream(Device of) const override { return Stream(Stream::DEFAULT, of); }
  Stream getDefaultStream(Device of) const override { return Stream(Stream::DEFAULT, of); }
  Stream getNewStream(Device of, int) const override { return Stream(Stream::DEFAULT, of); }
  Stream getStreamFromGlobalPool(Device of, bool) const override { return Stream(Stream::DEFAULT, of); }
  Stream exchangeStream(Stream) const override { return getStream(getDevice()); }
  DeviceIndex deviceCount() const noexcept override { return device_count; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(DeviceIndex) const override {}
  void record(void**, const Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// ---- random numbers: those of the CPU, from a generator of the device

struct Random final : c10::GeneratorImpl {
  explicit Random(DeviceIndex index)
      : GeneratorImpl(Device(kPretend, index), c10::DispatchKeySet(kKey)), host(at::detail::createCPUGenerator()) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  Random* clone_impl() const override {
    auto* copy = new Random(device().index());
    copy->host = host.clone();
    return copy;
  }
  at::Generator host;
};

const at::Generator& default_generator(DeviceIndex index) {
  static std::vector<at::Generator>* all = [] {
    auto* made = new std::vector<at::Generator>();
    for (DeviceIndex each = 0; each < device_count; ++each) made->push_back(at::make_generator<Random>(each));
    return made;
  }();
  return all->at(index < 0 ? current : index);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex to) const override { Guard().setDevice(Device(kPretend, to)); }
  DeviceIndex exchangeDevice(DeviceIndex to) const override {
    auto before = current;
    if (to >= 0) current = to;
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex to) const override { return exchangeDevice(to); }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<Random>(index < 0 ? current : index);
  }
  at::Device getDeviceFromPtr(void*) const override { return Device(kPretend, current); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return PinnedMemory::holds(data); }
};

// ---- operators

// Another name for a storage: the same bytes on another device, which keep the first one alive.
c10::Storage same_bytes(const c10::Storage& storage, Device on) {
  auto* kept = new c10::Storage(storage);
  auto* data = const_cast<void*>(storage.data());
  c10::DataPtr pointer(data, kept, [](void* each) { delete static_cast<c10::Storage*>(each); }, on);
  auto* allocator = on.is_cpu() ? c10::GetCPUAllocator() : static_cast<c10::Allocator*>(&memory);
  return c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(pointer), allocator, true);
}

at::Tensor over(const c10::Storage& storage, const at::Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

struct Call {
  struct Given {
    at::Tensor own, host;
    c10::Storage before;
    bool written;
  };
  std::vector<Given> given;
  std::unordered_map<c10::StorageImpl*, c10::Storage> shared;
  std::optional<Device> on;
  std::string name;

  bool is_ours(const at::Tensor& each) const { return each.defined() && each.device().type() == kPretend; }

  // CUDA takes indices and values of the host in these.
  bool takes_host() const {
    static const std::set<std::string> names = {
        "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put", "aten::copy_",
        "aten::_copy_from", "aten::_copy_from_and_resize", "aten::set_.source_Tensor", "aten::_unsafe_index.Tensor"};
    return names.count(name) > 0;
  }

  void find_device(const at::Tensor& each) {
    if (!is_ours(each)) return;
    if (on.has_value() && *on != each.device()) refuse(each);
    on = each.device();
  }

  void refuse(const at::Tensor& each) const {
    TORCH_CHECK(
        false, "Expected all tensors to be on the same device, but found at least two devices, ",
        on->str(), " and ", each.device().str(), "! (in ", name, ", of shape ", each.sizes(), ")");
  }

  at::Tensor host_of(const at::Tensor& own, bool written) {
    if (!own.defined()) return own;
    if (!is_ours(own)) {
      if (own.device().is_cpu() && (own.dim() == 0 || takes_host())) return own;
      refuse(own);
    }
    for (auto& each : given) {
      if (each.own.is_same(own)) {
        each.written |= written;
        return each.host;
      }
    }
    auto* key = own.storage().unsafeGetStorageImpl();
    auto found = shared.find(key);
    if (found == shared.end()) found = shared.emplace(key, same_bytes(own.storage(), at::kCPU)).first;
    auto host = over(found->second, own, c10::DispatchKey::CPU);
    given.push_back({own, host, found->second, written});
    return host;
  }

  // What an operator did to sizes and memory of its arguments is done to ours.
  void adopt() {
    for (auto& each : given) {
      if (!each.written) continue;
      auto* impl = each.own.unsafeGetTensorImpl();
      auto* was = each.before.unsafeGetStorageImpl();
      auto* now = each.host.storage().unsafeGetStorageImpl();
      if (now != was) {
        impl->set_storage_keep_dtype(same_bytes(each.host.storage(), *on));
      } else if (now->data() != each.own.storage().data() || now->nbytes() != each.own.storage().nbytes()) {
        auto renewed = same_bytes(each.host.storage(), *on);
        auto* ours = each.own.storage().unsafeGetStorageImpl();
        ours->set_data_ptr_noswap(std::move(renewed.unsafeGetStorageImpl()->mutable_data_ptr()));
        ours->set_nbytes(now->nbytes());
      }
      if (each.own.sizes() != each.host.sizes() || each.own.strides() != each.host.strides() ||
          each.own.storage_offset() != each.host.storage_offset()) {
        impl->set_sizes_and_strides(each.host.sizes(), each.host.strides(), each.host.storage_offset());
      }
    }
  }

  at::Tensor ours(const at::Tensor& host) {
    if (!host.defined() || !host.device().is_cpu()) return host;
    for (auto& each : given)
      if (each.host.is_same(host)) return each.own;
    for (auto& each : given)
      if (each.host.storage().unsafeGetStorageImpl() == host.storage().unsafeGetStorageImpl())
        return over(each.own.storage(), host, kKey);
    return over(same_bytes(host.storage(), *on), host, kKey);
  }
};

bool reads_values(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2",
      "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::is_nonzero"};
  return names.count(name) > 0;
}

std::string full_name(const c10::FunctionSchema& schema) {
  return schema.overload_name().empty() ? schema.name() : schema.name() + "." + schema.overload_name();
}

void on_host(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const auto begin = stack->size() - arguments.size();
  Call call;
  call.name = full_name(schema);
  for (size_t at = 0; at < arguments.size(); ++at) {
    const auto& value = (*stack)[begin + at];
    if (value.isTensor()) {
      call.find_device(value.toTensor());
    } else if (value.isTensorList()) {
      for (const auto& each : value.toTensorVector()) call.find_device(each);
    } else if (value.isOptionalTensorList()) {
      for (const auto& each : value.toOptionalTensorVector())
        if (each.has_value()) call.find_device(*each);
    } else if (value.isDevice() && value.toDevice().type() == kPretend && !call.on.has_value()) {
      auto wanted = value.toDevice();
      call.on = Device(kPretend, wanted.has_index() ? wanted.index() : current);
    }
  }
  TORCH_CHECK(call.on.has_value(), "pretend: nothing in ", call.name, " says which device is meant");
  {
    std::lock_guard<std::mutex> lock(counts().mutex);
    ++counts().operators[call.on->index()];
  }
  if (reads_values(call.name)) count_read(call.name);
  for (size_t at = 0; at < arguments.size(); ++at) {
    auto& value = (*stack)[begin + at];
    const auto* alias = arguments[at].alias_info();
    const bool written = alias != nullptr && alias->isWrite();
    if (value.isTensor()) {
      value = call.host_of(value.toTensor(), written);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> moved;
      for (const auto& each : value.toTensorVector()) moved.push_back(call.host_of(each, written));
      value = moved;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> moved;
      for (const auto& each : value.toOptionalTensorVector())
        moved.push_back(each.has_value() ? std::optional<at::Tensor>(call.host_of(*each, written)) : std::nullopt);
      value = moved;
    } else if (value.isDevice()) {
      value = Device(c10::DeviceType::CPU);
    } else if (value.isGenerator()) {
      auto* own = dynamic_cast<Random*>(value.toGenerator().unsafeGetGeneratorImpl());
      TORCH_CHECK(own != nullptr, "Expected a '", call.on->str(), "' device type for generator but found 'cpu'");
      value = own->host;
    } else if (value.isNone() && arguments[at].type()->str() == "Generator?") {
      value = static_cast<Random*>(default_generator(call.on->index()).unsafeGetGeneratorImpl())->host;
    }
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.adopt();
  const auto results = schema.returns().size();
  for (size_t at = stack->size() - results; at < stack->size(); ++at) {
    auto& value = (*stack)[at];
    if (value.isTensor()) {
      value = call.ours(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> moved;
      for (const auto& each : value.toTensorVector()) moved.push_back(call.ours(each));
      value = moved;
    }
  }
}

Device device_or_current(std::optional<Device> device) {
  return device.has_value() && device->has_index() ? *device : Device(kPretend, current);
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(kKey), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_strided_generic(
      size, stride, &memory, c10::DispatchKeySet(kKey), c10::dtype_or_default(dtype));
}

at::Tensor host(const at::Tensor& ours) {
  if (ours.device().is_cpu()) return ours;
  return over(same_bytes(ours.storage(), at::kCPU), ours, c10::DispatchKey::CPU);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const bool waits = !non_blocking || !PinnedMemory::holds(to.storage().data());
  if (to.device().is_cpu() && from.device().type() == kPretend && waits) count_read("copy to the host");
  host(to).copy_(host(from), non_blocking);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor ours(const at::Tensor& host, Device on) {
  return over(same_bytes(host.storage(), on), host, kKey);
}

at::Tensor convolution(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
    int64_t groups) {
  for (const auto& each : {weight, bias.value_or(at::Tensor())})
    TORCH_CHECK(!each.defined() || each.device() == input.device(), "pretend: a convolution over two devices");
  auto own = bias.has_value() && bias->defined() ? std::optional<at::Tensor>(host(*bias)) : std::nullopt;
  return ours(
      at::convolution(host(input), host(weight), own, stride, padding, dilation, transposed, output_padding, groups),
      input.device());
}

at::Tensor& set_storage(at::Tensor& own, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = own.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  const bool contiguous = stride.empty() && !size.empty();
  auto strides = contiguous ? c10::contiguous_strides(size) : c10::DimVector(stride.begin(), stride.end());
  impl->set_sizes_and_strides(size, strides, offset);
  return own;
}

// ---- collectives: gloo's over the same bytes, for tensors of the current device alone, as NCCL takes them

struct Group final : c10d::Backend {
  using Tensors = std::vector<at::Tensor>;
  using Made = c10::intrusive_ptr<c10d::Work>;

  explicit Group(c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo(std::move(gloo)) {}

  const std::string getBackendName() const override { return "pccl"; }

  static at::Tensor taken(const at::Tensor& each) {
    TORCH_CHECK(each.device().type() == kPretend, "pccl: a tensor of ", each.device().str());
    TORCH_CHECK(
        each.device().index() == current, "pccl: a tensor of ", each.device().str(), " while device ",
        static_cast<int>(current), " is the current one");
    TORCH_CHECK(each.is_contiguous(), "pccl: Tensors must be contiguous");
    return host(each);
  }
  static Tensors taken(const Tensors& all) {
    Tensors found;
    for (const auto& each : all) found.push_back(taken(each));
    return found;
  }
  static std::vector<Tensors> taken(const std::vector<Tensors>& all) {
    std::vector<Tensors> found;
    for (const auto& each : all) found.push_back(taken(each));
    return found;
  }

  Made broadcast(Tensors& all, const c10d::BroadcastOptions& options) override {
    auto own = taken(all);
    return gloo->broadcast(own, options);
  }
  Made allreduce(Tensors& all, const c10d::AllreduceOptions& options) override {
    auto own = taken(all);
    return gloo->allreduce(own, options);
  }
  Made allgather(std::vector<Tensors>& to, Tensors& from, const c10d::AllgatherOptions& options) override {
    auto own_to = taken(to);
    auto own = taken(from);
    return gloo->allgather(own_to, own, options);
  }
  Made _allgather_base(at::Tensor& to, at::Tensor& from, const c10d::AllgatherOptions& options) override {
    auto own_to = taken(to), own = taken(from);
    return gloo->_allgather_base(own_to, own, options);
  }
  Made reduce_scatter(Tensors& to, std::vector<Tensors>& from, const c10d::ReduceScatterOptions& options) override {
    auto own_to = taken(to);
    auto own = taken(from);
    return gloo->reduce_scatter(own_to, own, options);
  }
  Made _reduce_scatter_base(at::Tensor& to, at::Tensor& from, const c10d::ReduceScatterOptions& options) override {
    auto own_to = taken(to), own = taken(from);
    return gloo->_reduce_scatter_base(own_to, own, options);
  }
  Made alltoall_base(
      at::Tensor& to, at::Tensor& from, std::vector<int64_t>& to_sizes, std::vector<int64_t>& from_sizes,
      const c10d::AllToAllOptions& options) override {
    auto own_to = taken(to), own = taken(from);
    return gloo->alltoall_base(own_to, own, to_sizes, from_sizes, options);
  }
  Made send(Tensors& all, int to, int tag) override {
    auto own = taken(all);
    return gloo->send(own, to, tag);
  }
  Made recv(Tensors& all, int from, int tag) override {
    auto own = taken(all);
    return gloo->recv(own, from, tag);
  }
  Made barrier(const c10d::BarrierOptions& options) override { return gloo->barrier(options); }
  void abort() override { gloo->abort(); }
  void shutdown() override { gloo->shutdown(); }

  c10::intrusive_ptr<c10d::Backend> gloo;
};

at::Tensor& set_whole_storage(at::Tensor& own, at::Storage source) {
  const auto size = static_cast<int64_t>(source.nbytes() / own.dtype().itemsize());
  return set_storage(own, std::move(source), 0, {size}, {});
}

int64_t choose_attention(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return static_cast<int64_t>(sdp::SDPBackend::math);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("convolution_overrideable", &convolution);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&on_host>());
  m.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&on_host>());
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("start", [](DeviceIndex count) {
    device_count = count;
    c10::SetAllocator(kPretend, &memory);
    at::RegisterPrivateUse1HooksInterface(new Hooks());
  });
  m.def("device_count", [] { return device_count; });
  m.def("current_device", [] { return current; });
  m.def("set_device", [](DeviceIndex to) { Guard().setDevice(Device(kPretend, to)); });
  m.def("default_generator", [](DeviceIndex index) { return default_generator(index); });
  m.def("host", &host);
  m.def("group", [](const c10::intrusive_ptr<c10d::Backend>& gloo) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<Group>(gloo);
  });
  m.def("reads", [] {
    std::lock_guard<std::mutex> lock(counts().mutex);
    return counts().reads;
  });
  m.def("operators", [] {
    std::lock_guard<std::mutex> lock(counts().mutex);
    return counts().operators;
  });
  m.def("forget_counts", [] {
    std::lock_guard<std::mutex> lock(counts().mutex);
    counts().reads.clear();
    counts().operators.clear();
  });
  m.def("on_read", [](py::object call) { counts().on_read = call; });
}
