import polars as pl
import pytest

from perfmodel.classify import CLASSES, class_shares, classify, kernel_class, read_rules, shipped_rules
from perfmodel.errors import InputError
from perfmodel.readers import read_trace
from tests.traces_made import events, golden_rows, kernel

# Names as profilers record them, of NVIDIA, AMD, PyTorch, vLLM, SGLang, TensorRT-LLM, DeepEP and TorchInductor.
NAMES = {
    "gemm": (
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_64x6_tn_align8>(...)",
        "Cijk_Alik_Bljk_B_BS_BH_Bias_HA_S_SAV_UserArgs_MT256x128x64_MI16x16x1_SN",
        "nvjet_tst_64x64_64x16_2x1_2cta_v_bz_bias_TNT",
        "volta_sgemm_64x64_nt",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, float, float, float, true, true, false>(...)",
        "void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>(...)",
        "triton_tem_fused_mm_3",
    ),
    "grouped_gemm": (
        "_ZN5aiter47fmoe_bf16_blockscaleFp8_g1u1_vs_silu_1tg_32x256E",
        "fused_moe_kernel",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<...>>>",
        "_matmul_ogs_NNT_bf16xbf16xmxfp4_16x128x256x1_swiglu",
        "bmm_Bfloat16_MxE2m1MxE4m3_Fp32_t128x16x256u2_s3_et128x16_m128x16x32_dynBatch_sm100f",
        "void deep_gemm::sm90_m_grouped_fp8_gemm_1d2d_impl<...>",
    ),
    "attention": (
        "triton_tem_fused_flex_attention_0",
        "void flash::flash_fwd_splitkv_combine_kernel<...>",
        "fmhaSm100aKernel_QkvE4m3OBfloat16H64PagedKvCausalP16VarSeqQ128Kv128PersistentContext",
        "void paged_attention_ll4mi_reduce_kernel<__hip_bfloat16, __hip_bfloat16, 128, 128, 256, 3, false>(...)",
        "attn_fwd",
    ),
    "moe_all_to_all": (
        "void dpsk::ep::internode::dispatch<false, 1, false, 5120>(...)",
        "void dpsk::ep::internode::combine<false, 1, __nv_bfloat16>(...)",
        "void deep_ep::internode_ll::combine<true, 7168, 9>(...)",
        "void deep_ep::intranode::notify_dispatch<8>(...)",
        "nvshmemi_transfer_rma_nbi",
        "void pplx::AllToAllInterNode::dispatchSendKernel<...>",
        "tensorrt_llm::kernels::moe_a2a_dispatch",
        "my_all2all_kernel",
    ),
    "moe_dispatch": (
        "void vllm::moe::moe_align_block_size_kernel<int>(...)",
        "_combined_routing_compute",
        "void aiter::grouped_topk_kernel<float, 8, 1, 1, true, true, false>(...)",
        "void tensorrt_llm::kernels::finalizeMoeRoutingKernel<...>",
    ),
    "collective": (
        "ncclDevKernel_AlltoAll_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclDevComm*, unsigned long, ncclWork*)",
        "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 8>(...)",
        "void (anonymous namespace)::multimem_all_reduce_kernel<c10::BFloat16, 16>(...)",
    ),
    "copy": (
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(...)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float, unsigned int, 2, 128, 1>(...)",
        "__amd_rocclr_copyBuffer",
        "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, unsigned char>(...)",
        "void cudnn::ops::nchwToNhwcKernel<float, float, float, false, true>(...)",
    ),
    "elementwise": (
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >(...)",
        "void vllm::rotary_embedding_kernel<c10::BFloat16, true>(...)",
        "triton_poi_fused__scaled_dot_product_attention_mm_add_1",
        "void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctor<float>, float>(...)",
        "void at::native::vectorized_elementwise_kernel<4, fbgemm_gpu::_float_to_hfp8_gpu(...)",
    ),
    "reduction": (
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float> > >(...)",
        "std::enable_if<vllm::_typeConvert<c10::BFloat16>::exists>::type vllm::fused_add_rms_norm_kernel<...>",
        "void (anonymous namespace)::softmax_warp_forward<float, float, float, 10, true, false>(...)",
        "triton_red_fused_add_mean_mul_pow_rsqrt_0",
        "void cutlass_cudnn_train::Kernel<cutlass_cudnn_train::reduction::kernel::ReduceSplitK<...>>(...)",
    ),
    "other": ("void fft2d_r2c_32x32<float, false, 5u, true>(float2*, cudnn::reduced_divisor)", "triton__0d1d2d3d"),
}  # fmt: skip


@pytest.mark.parametrize(("expected", "name"), [(c, n) for c, names in NAMES.items() for n in names])
def test_known_kernels(expected: str, name: str) -> None:
    assert kernel_class(name) == expected


def test_every_class_but_other_has_a_rule() -> None:
    assert {name for name, _ in shipped_rules()} == set(CLASSES) - {"other"}


def test_a_column_of_names() -> None:
    names = pl.Series(["volta_sgemm_64x64_nt", None, "??", "volta_sgemm_64x64_nt"], dtype=pl.Categorical)
    assert classify(names).to_list() == ["gemm", None, "other", "gemm"]
    assert classify(pl.Series([], dtype=pl.String)).to_list() == []
    assert classify(names.slice(1, 2)).to_list() == [None, "other"]
    assert classify(pl.Series(["??", None, "attn_fwd"])).to_list() == ["other", None, "attention"]
    assert classify(pl.Series([None], dtype=pl.Categorical)).to_list() == [None]


def test_shares_by_hand_and_their_sum() -> None:
    trace = events(
        kernel(0, 30, name="volta_sgemm_64x64_nt"),
        kernel(40, 60, name="ampere_sgemm_128x64_nn"),
        kernel(100, 10, name="attn_fwd"),
        {"kind": "copy", "name": "Memcpy HtoD", "start_ns": 0, "dur_ns": 999},
    )
    assert class_shares(trace).rows() == [("gemm", 2, 90, 0.9), ("attention", 1, 10, 0.1)]
    assert class_shares(events({"kind": "op", "start_ns": 0})).is_empty()
    assert class_shares(events(kernel(0, 0)))["time_frac"].to_list() == [None]


def test_own_rules_replace_the_shipped_ones() -> None:
    rules = read_rules("""[[rule]]
class = "attention"
pattern = 'my_\\w+_kernel'
""")
    assert classify(pl.Series(["MY_fast_kernel", "gemm"]), rules).to_list() == ["attention", "other"]


@pytest.mark.parametrize(
    "text",
    [
        "[[rule",
        '[[rule]]\nclass = "gemm"',
        '[[rule]]\nclass = "gemm"\npattern = "("',
        '[[rule]]\nclass = "x"\npattern = "x"',
    ],
)
def test_broken_rules_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="kernel rules"):
        read_rules(text)


@pytest.mark.parametrize("row", golden_rows("kineto_golden.csv"), ids=lambda row: row["file"])
def test_shares_of_real_traces_add_up(shared, row) -> None:
    """And what no rule knows stays small, so that a change of rules that loses many names is seen."""
    shares = class_shares(read_trace(shared / "traces" / row["file"]).events)
    assert shares["n_kernels"].sum() == int(row["kernels"])
    assert shares["time_frac"].sum() == pytest.approx(1.0) if not shares.is_empty() else True
    unknown = shares.filter(pl.col("class") == "other")["time_frac"].sum()
    assert unknown < 0.1 or int(row["kernels"]) < 100
