#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| envelog_fuzz::sm4(data));
