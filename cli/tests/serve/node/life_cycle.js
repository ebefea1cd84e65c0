// The life of a project and a Logstore. Arguments: encrypt_conf as JSON.
'use strict';

const { client, createLogstore, find, histograms, put, refused, updateLogstore } = require('./sdk');
const assert = require('assert');

const conf = JSON.parse(process.argv[2]);
const [project, logstore] = ['node-life', 'logs'];
const it = client();
const texts = async (query) => (await find(it, project, logstore, query)).map((log) => log.text).sort();

async function configurations() {
    const create = (encrypt_conf) => createLogstore(it, project, logstore, { ttl: 3, shardCount: 2, encrypt_conf });
    const missing = await refused('LogStoreInfoInvalid', () => create({ ...conf, encrypt_type: undefined }));
    assert(missing.includes('encrypt_type'), missing);
    await refused('LogStoreInfoInvalid', () => create({ ...conf, encrypt_type: 'aes_ecb' }));
    if (conf.user_cmk_info) {
        const cmk = (more) => ({ ...conf, user_cmk_info: { ...conf.user_cmk_info, ...more } });
        const nowhere = await refused('ParameterInvalid', () => create(cmk({ region_id: 'nowhere' })));
        assert(nowhere.includes('nowhere'), nowhere);
        await refused('KmsKeyRevoked', () => create(cmk({ cmk_key_id: 'key-unknown' })));
        await refused('Unauthorized', () => create(cmk({ arn: 'acs:ram::1:role/other' })));
    }
    await refused('LogStoreNotExist', () => it.getLogStore(project, logstore));
    await create(conf);
    await refused('LogStoreAlreadyExist', () => create(conf));
    const got = await it.getLogStore(project, logstore);
    assert.deepStrictEqual([got.ttl, got.shardCount, got.encrypt_conf], [3, 2, conf]);

    // The SDK's own update has no encrypt_conf: it is refused, and changes nothing.
    const why = await refused('ParameterInvalid', () => it.updateLogStore(project, logstore, { ttl: 9 }));
    assert(why.includes('encrypt_conf'), why);
    const other = conf.encrypt_type === 'sm4' ? 'default' : 'sm4';
    const update = (encrypt_conf) => updateLogstore(it, project, logstore, { ttl: 9, encrypt_conf });
    await refused('ParameterInvalid', () => update({ ...conf, encrypt_type: other }));
    const cmk = { cmk_key_id: 'key-other', arn: 'acs:ram::13234:role/logsource', region_id: 'cn-hangzhou' };
    await refused('ParameterInvalid', () => update({ ...conf, user_cmk_info: cmk }));
    assert.strictEqual((await it.getLogStore(project, logstore)).ttl, 3);
    await update(conf);
    assert.strictEqual((await it.getLogStore(project, logstore)).ttl, 9);
    const listed = await it.listLogStore(project);
    assert.deepStrictEqual(listed.logstores, [logstore]);
}

async function data() {
    await put(it, project, logstore, 'first \u4e16\u754c');
    await put(it, project, logstore, 'second', { topic: 'a topic', source: 'here', tags: [{ k: 'v' }] });
    await refused('PostBodyInvalid', () => it.postLogStoreLogs(project, logstore, { logs: [] }));
    await refused('LogStoreNotExist', () => put(it, project, 'none', 'x'));
    assert.deepStrictEqual(await texts('*'), ['first \u4e16\u754c', 'second']);
    const [tagged] = await find(it, project, logstore, 'SECOND and not first');
    assert.deepStrictEqual([tagged.__topic__, tagged.__source__, tagged['__tag__:k']], ['a topic', 'here', 'v']);
    await refused('ParameterInvalid', () => find(it, project, logstore, '* | select 1'));
    const counts = await histograms(it, project, logstore, 'second');
    assert.strictEqual(counts.reduce((sum, part) => sum + part.count, 0), 1);
    await refused('NotSupported', () => it.getIndexConfig(project, logstore));
}

// Encryption begins with a later update. Logs from before it stay readable.
async function laterEncryption() {
    await it.createLogStore(project, 'later', { ttl: 3, shardCount: 1 });
    await put(it, project, 'later', 'before');
    await it.updateLogStore(project, 'later', { ttl: 4 });
    await updateLogstore(it, project, 'later', { encrypt_conf: conf });
    await put(it, project, 'later', 'after');
    const found = (await find(it, project, 'later', '*')).map((log) => log.text).sort();
    assert.deepStrictEqual(found, ['after', 'before']);
    await it.deleteLogStore(project, 'later');
}

async function main() {
    await it.createProject(project, { description: 'a life' });
    await refused('ProjectAlreadyExist', () => it.createProject(project, { description: '' }));
    assert.strictEqual((await it.getProject(project)).description, 'a life');
    await configurations();
    await data();
    await laterEncryption();
    await updateLogstore(it, project, logstore, { encrypt_conf: { ...conf, enable: false } });
    await put(it, project, logstore, 'in the clear');
    assert.deepStrictEqual(await texts('*'), ['first \u4e16\u754c', 'in the clear', 'second']);
    await refused('ProjectNotEmpty', () => it.deleteProject(project));
    await it.deleteLogStore(project, logstore);
    await refused('LogStoreNotExist', () => it.getLogStore(project, logstore));
    await it.deleteProject(project);
    await refused('ProjectNotExist', () => it.getProject(project));
    console.log('done');
}

main().catch((error) => {
    console.error(error);
    process.exit(1);
});
