#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| envelog_fuzz::service(data));
