"""Kernels by category, and the time between them."""

import pytest
import torch

from minimti.bench import profiling
from minimti.bench.profiling import Kernel, category, gpu_time, kernels_of, shares
from minimti.bench.report import NotMeasurable

# As the profiler printed them on an H100 (torch 2.11; "..." where it cut them), and some in full.
NAMES = {
    "attention": [
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1...",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4x1_cga1...",
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 64, 4...",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::...",
        "void (anonymous namespace)::softmax_warp_forward<c10::BFloat16, c10::BFloat16, float, 4, false, false>(...",
        "triton_per_fused__softmax_2",
    ],
    "convolutions": [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize256x128x64_war...",
        "sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_war...",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_s1688fprop_optimized_tf32_128x128_16x4_nhwc_align4>(...",
        "void implicit_convolve_sgemm<float, float, 128, 5, 5, 3, 3, 3, 1, true, false, true>(int, ...",
    ],
    "norms": [
        "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>(long, c...",
        "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, flo...",
        "void at::native::(anonymous namespace)::layer_norm_grad_input_kernel_vectorized<c10::BF...",
        "void at::native::(anonymous namespace)::ComputeInternalGradientsCUDAKernel<c10::BFloat1...",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::(anonymous"
        " namespace)::GroupNormKernelImplInternal<c10::BFloat16>(at::Tensor const&, ...",
        "triton_red_fused_native_layer_norm_5",
        "triton_poi_fused_native_group_norm_silu_7",
        "_affine",
        "_backward_apply",
    ],
    "products": [
        "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT",
        "void cutlass::Kernel2<cutlass_75_tensorop_bf16_s1688gemm_bf16_64x64_nn_align1>(cutlass_...",
        "void cutlass::Kernel2<cutlass_75_wmma_tensorop_bf16_s161616gemm_bf16_32x32_32x1_nn_alig...",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, false, __nv_b...",
        "triton_tem_fused_mm_3",
    ],
    "copies": [
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, ...",
        "void cudnn::engines_precompiled::nhwcToNchwKernel<__nv_bfloat16, __nv_bfloat16, float, ...",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::(anonymous name...",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_alignedK_contig<at::native:...",
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel"
        "_cuda(at::TensorIteratorBase&)::{lambda()#3}::operator()() ...",
        "Memset (Device)",
        "Memcpy DtoD (Device -> Device)",
    ],
    "element-wise": [
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::nati...",
        "void at::native::vectorized_elementwise_kernel<8, at::native::BinaryFunctor<c10::BFloat...",
        "void at::native::vectorized_elementwise_kernel<8, at::native::GeluCUDAKernelImpl(at::Te...",
        "void at::native::vectorized_elementwise_kernel<8, at::native::(anonymous namespace)::si...",
        "void at::native::(anonymous namespace)::upsample_nearest2d_nhwc_out_frame<c10::BFloat16...",
        "triton_poi_fused_add_convolution_4",
        "triton_poi_fused_convert_element_type_0",
        "_geglu",
        "_geglu_backward",
    ],
}


@pytest.mark.parametrize("expected, name", [(kind, name) for kind, names in NAMES.items() for name in names])
def test_a_kernel_has_the_category_of_its_name(expected, name):
    assert category(name) == expected


def test_idle_is_what_the_kernels_leave_of_the_step():
    kernels = [
        Kernel("nvjet_a", 1000, 500),
        Kernel("nvjet_b", 1200, 100),  # beside the first
        Kernel("Memset (Device)", 3000, 250),
        Kernel("nvjet_c", 1400, 300),  # half of it beside the first; the order does not matter
    ]
    found = shares(kernels, step_s=0.002)
    assert found["products"] == pytest.approx(0.9) and found["copies"] == pytest.approx(0.25)
    assert found["norms"] == found["attention"] == found["element-wise"] == 0
    assert found["idle"] == pytest.approx(2 - (0.7 + 0.25))
    assert (found["step"], found["kernels"]) == (2, 4)
    assert shares(kernels, step_s=0.0005)["idle"] == 0


def test_only_what_ran_on_the_gpu_is_taken_from_a_trace():
    events = [
        {"ph": "X", "cat": "kernel", "name": "nvjet_a", "ts": 1.5, "dur": 2},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 4, "dur": 1},
        {"ph": "X", "cat": "overhead", "name": "Command Buffer Full", "ts": 0, "dur": 99},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 50},
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    ]
    assert kernels_of({"traceEvents": events}) == [Kernel("nvjet_a", 1.5, 2), Kernel("Memcpy DtoD", 4, 1)]


def test_a_trace_without_kernels_is_not_measurable(monkeypatch):
    """The profiler itself runs, on a CPU: there are events, but none of a GPU."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    traces = []
    monkeypatch.setattr(profiling, "kernels_of", lambda trace: traces.append(trace) or kernels_of(trace))
    with pytest.raises(NotMeasurable, match="recorded no kernel"):
        gpu_time(lambda: torch.ones(64, 64) @ torch.ones(64, 64))
    assert any(event.get("name") == "aten::mm" for event in traces[0]["traceEvents"])
