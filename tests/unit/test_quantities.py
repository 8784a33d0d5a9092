"""What is proposed for a bandwidth in another spelling is accepted as it stands, and is the rate that was meant."""

import re

import pytest

from devmap_config.profile.quantities import QuantityError, parse_bandwidth, parse_bytes

SPELLINGS = {
    "25 Gb/s": [3_125_000_000],
    "25Gb/s": [3_125_000_000],
    "25gbit/s": [3_125_000_000],
    "25 Gbit/s": [3_125_000_000],
    "200Gbit/s": [25_000_000_000],
    "80Gbps": [10_000_000_000],
    "100gbps": [12_500_000_000],
    "100Mbit/s": [12_500_000],
    "9600bit/s": [1_200],
    "9600bps": [1_200],
    "64kb/s": [8_000],
    "8Gibit/s": [2**30],
    "1.000000000000000001Tbit/s": [125_000_000_000],
    "25gb/s": [25_000_000_000, 3_125_000_000],  # either could be meant
    "25GBps": [25_000_000_000],
    "25GB": [25_000_000_000],
    "25GB/sec": [25_000_000_000],
    "25gB/s": [25_000_000_000],
    "25KB/S": [25_000],
    "25gibit": [25 * 2**30 // 8],
    "25GiB": [25 * 2**30],
    "25G": [25 * 2**30, 25_000_000_000],
    "25 g/s": [25 * 2**30, 25_000_000_000],
    "25Gi/s": [25 * 2**30],
}


@pytest.mark.parametrize("text", SPELLINGS)
def test_the_rate_proposed_for_a_bandwidth_is_the_intended_one(text):
    with pytest.raises(QuantityError) as refused:
        parse_bandwidth(text)
    assert [parse_bandwidth(each) for each in re.findall("`(.*?)`", refused.value.help)] == SPELLINGS[text]


@pytest.mark.parametrize("text", ["25 parsecs", "25/s", "1bit/s", "25GiBs", "25 \N{KELVIN SIGN}b/s"])
def test_no_rate_is_proposed_for_text_that_is_no_bandwidth(text):
    with pytest.raises(QuantityError) as refused:
        parse_bandwidth(text)
    assert refused.value.help.startswith(("units are ", "write a bandwidth as "))


def test_memory_in_another_spelling_is_proposed_both_ways():
    with pytest.raises(QuantityError) as refused:
        parse_bytes("20 gb")
    assert [parse_bytes(each) for each in re.findall("`(.*?)`", refused.value.help)] == [20 * 2**30, 20 * 10**9]
