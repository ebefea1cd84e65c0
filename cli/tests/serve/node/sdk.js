// What the scripts of the tests share: a client of the unmodified SDK, which finds the service.
//
// The SDK asks for the host PROJECT.sls.local. In this process such names resolve to the loopback address.
'use strict';

const dns = require('dns');

const HOST = 'sls.local';
const lookup = dns.lookup;
dns.lookup = (name, options, callback) => {
    const isOurs = name === HOST || name.endsWith('.' + HOST);
    return lookup(isOurs ? '127.0.0.1' : name, options, callback);
};

const assert = require('assert');
const Client = require('@alicloud/log');

exports.client = () => new Client({
    accessKeyId: 'tester',
    accessKeySecret: 'secret of tester',
    endpoint: 'http://' + HOST + ':' + process.env.SERVE_PORT,
});

// The SDK's own call has no field for encrypt_conf: this sends the same request with it.
const send = (client, method, project, path, data) => {
    const body = Buffer.from(JSON.stringify(data));
    return client._request(method, project, path, {}, body, {}, {});
};
exports.createLogstore = (client, project, logstoreName, data) =>
    send(client, 'POST', project, '/logstores', Object.assign({ logstoreName }, data));
exports.updateLogstore = (client, project, logstoreName, data) =>
    send(client, 'PUT', project, '/logstores/' + logstoreName, Object.assign({ logstoreName }, data));

const now = () => Math.floor(Date.now() / 1000);
exports.put = (client, project, logstore, text, more) => {
    const logs = [{ timestamp: now(), content: { text } }];
    return client.postLogStoreLogs(project, logstore, Object.assign({ logs }, more));
};

// The logs that a query finds, in the order of time.
exports.find = async (client, project, logstore, query) => {
    const [from, to] = [new Date((now() - 600) * 1000), new Date((now() + 600) * 1000)];
    return client.getLogs(project, logstore, from, to, { query, line: 100 });
};
exports.histograms = (client, project, logstore, query) => {
    const [from, to] = [new Date((now() - 600) * 1000), new Date((now() + 600) * 1000)];
    return client.getHistograms(project, logstore, from, to, { query });
};

// Checks that a call throws with this code. Returns the message.
exports.refused = async (code, call) => {
    try {
        await call();
    } catch (error) {
        assert.strictEqual(error.code, code, error.message);
        assert.strictEqual(error.requestid.length, 24);
        return error.message;
    }
    throw new Error('accepted, and not refused with ' + code);
};
